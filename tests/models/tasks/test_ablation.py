"""What is left of a score without the concepts, and what a head learns with them."""

import pytest
import torch
import torch.nn.functional as F

from conceptron.models.config import ConceptConfig
from conceptron.models.layers import ZeroLinear
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.objectives import Diffusion, SampleKey, SpecialTokens
from conceptron.models.packing import pack
from conceptron.models.tasks.heads import (
    ConceptForMultipleChoice,
    ConceptForQuestionAnswering,
    ConceptForSequenceClassification,
)

SMALL = dict(
    vocab_size=60, hidden_size=32, num_concepts=6, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
    num_decoder_layers=1, mask_token_id=3, pad_token_id=0, num_labels=3,
)  # fmt: skip
SLOTS = {"pair": "separate", "pair_features": "slots"}


def model(kind=ConceptForSequenceClassification, **options) -> torch.nn.Module:
    """float64, and nothing at zero."""
    torch.manual_seed(0)
    built = kind(ConceptConfig(**{**SMALL, **options})).double().eval()
    for module in built.modules():
        if isinstance(module, ZeroLinear):
            torch.nn.init.normal_(module.weight, std=0.3)
    return built


def texts(*lengths: int, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 60, (n,), generator=generator) for n in lengths]


def test_what_an_ablation_does():
    built, rows = model(), texts(9, 14, 3)
    whole = built(packed=pack(rows)).logits
    shuffled = built(packed=pack(rows), ablate="shuffle").logits
    assert torch.allclose(shuffled, whole[[2, 0, 1]], atol=1e-9)
    zero = built(packed=pack(rows), ablate="zero")
    assert (zero.concepts == 0).all() and torch.allclose(zero.logits, built.classifier.bias.expand(3, 3))
    pair = model(**SLOTS)
    both = {"packed": pack(rows), "packed_b": pack(texts(4, 4, 9, seed=4))}
    assert torch.allclose(pair(**both, ablate="shuffle").logits, pair(**both).logits[[2, 0, 1]], atol=1e-9)
    choice, packed = model(ConceptForMultipleChoice), pack(texts(9, 5, 3, 12, 8, 7))
    scores = choice(packed=packed, num_choices=2).logits
    assert torch.allclose(choice(packed=packed, num_choices=2, ablate="shuffle").logits, scores[[2, 0, 1]], atol=1e-9)


@pytest.mark.parametrize("pool", ["mean", "weighted", "attention", "cls_query", "multi_query", "decoder"])
def test_a_head_without_concepts_stays_finite(pool):
    built, packed = model(pool=pool).train(), pack(texts(9, 0, 4))
    for ablate in ("zero", "shuffle"):
        out = built(packed=packed, labels=torch.tensor([0, 2, 1]), ablate=ablate)
        out.loss.backward()
        assert out.logits.isfinite().all() and out.loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in built.parameters())


def test_spans_without_the_concepts_keep_the_tokens_of_their_text():
    """Scores with the concepts of the other text: those of that text's memory asked by these tokens."""
    built, rows = model(ConceptForQuestionAnswering), texts(9, 4)
    packed, encoded = pack(rows), built.encoder(packed=pack(rows))
    hidden = built.decoder(
        encoded.last_hidden_state[[1, 0]], encoded.anchors[[1, 0]], packed.position_ids, packed.cu_seqlens, 9,
        input_ids=packed.input_ids,
    )  # fmt: skip
    out = built(packed=packed, ablate="shuffle")
    assert torch.allclose(torch.stack((out.start_logits, out.end_logits), -1), built.qa_outputs(hidden), atol=1e-9)


def test_a_masked_language_model_without_its_concepts():
    """The loss with the concepts of another text is that of decoding by hand with them, on both doors."""
    torch.manual_seed(0)
    built = ConceptForMaskedLM(ConceptConfig(**SMALL)).double().eval()
    rows, keys = texts(20, 9, 7), [SampleKey(0, 0, i) for i in range(3)]
    given = Diffusion().view(pack(rows), keys, SpecialTokens(3, frozenset({0, 3}), 60))
    encoded = built.encoder(packed=given.encoder)
    hidden = built.decoder(
        encoded.last_hidden_state[[2, 0, 1]], encoded.anchors[[2, 0, 1]], given.decoder_position_ids,
        given.decoder_cu_seqlens, given.decoder_max_seqlen, input_ids=given.decoder_input_ids,
    )  # fmt: skip
    nll = F.cross_entropy(built.lm_head(hidden), given.targets, reduction="none")
    expected = (given.weights * nll).sum() / given.divisor
    assert torch.allclose(built(view=given, ablate="shuffle").loss.double(), expected, rtol=1e-5)
    ids, labels = torch.stack(texts(12, 12)), torch.full((2, 12), -100)
    labels[:, 2:5] = 9
    swapped = built.encoder(ids).last_hidden_state.flip(0)
    logits = built(ids, labels=labels, ablate="shuffle").logits
    with_other = built.decoder(
        swapped, built.encoder(ids).anchors, torch.tensor([4]), torch.tensor([0, 0, 1], dtype=torch.int32), 1,
        input_ids=ids[1, 4:5],
    )  # fmt: skip
    assert torch.allclose(logits[1, 4], built.lm_head(with_other)[0], atol=1e-9)
    with pytest.raises(ValueError, match="needs two texts"):
        built(ids[:1], ablate="shuffle")


def bags(seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """64 texts of 8 words; in half of them the word 4 occurs twice and in the others the word 5."""
    generator = torch.Generator().manual_seed(seed)
    rows, labels = torch.randint(6, 60, (64, 8), generator=generator), torch.arange(64) % 2
    rows[:, [1, 5]] = 4 + labels[:, None]
    order = torch.randperm(64, generator=generator)
    return list(rows[order]), labels[order]


def trained(ablate: str | None, steps: int, **options) -> dict[str | None, float]:
    """Share of held-out texts that are told apart, by ablation, after training under one."""
    torch.manual_seed(0)
    built = ConceptForSequenceClassification(ConceptConfig(**{**SMALL, "num_labels": 2, **options}))
    optimizer = torch.optim.AdamW(built.parameters(), lr=5e-3)
    rows, labels = bags(seed=7)
    for _ in range(steps):
        optimizer.zero_grad()
        built(packed=pack(rows), labels=labels, ablate=ablate).loss.backward()
        optimizer.step()
    rows, labels = bags(seed=8)
    right = {}
    with torch.no_grad():
        for how in (None, "zero", "shuffle"):
            guesses = built.eval()(packed=pack(rows), ablate=how).logits.argmax(-1)
            right[how] = float((guesses == labels).float().mean())
    return right


def test_what_concepts_alone_have_learned_is_chance_without_them():
    right, (_, labels) = trained(None, steps=20), bags(seed=8)
    agree = float((labels == labels.roll(1)).float().mean())  # what the concepts of a neighbour happen to get right
    assert right[None] > 0.95 and right["zero"] == 0.5
    assert abs(right["shuffle"] - agree) < 0.06 and abs(agree - 0.5) < 0.15


@pytest.mark.parametrize("options, leaks", [
    ({"pool": "mean"}, False), ({"pool": "decoder_positions", "decoder_queries": "position"}, False),
    ({"pool": "decoder"}, True),
])  # fmt: skip
def test_rows_that_know_their_token_need_no_concepts(options, leaks):
    """Trained without concepts, only what goes past them can be right, then also beside those of another text."""
    right = trained("zero", steps=20, **options)
    assert min(right["zero"], right["shuffle"]) > 0.7 if leaks else set(right.values()) == {0.5}


def test_a_similarity_is_learned():
    """STS-B style: the share of common words, from 0 to 5, of two texts encoded by themselves."""
    torch.manual_seed(0)
    rows = texts(*[8] * 48, seed=9)
    kept = torch.arange(48) % 9
    others = [torch.cat((row[:n], other[n:])) for row, n, other in zip(rows, kept, texts(*[8] * 48), strict=True)]
    labels = kept * 5 / 8
    options = dict(num_labels=1, pair="separate", pair_features="cosine", label_scale=5.0)
    built = ConceptForSequenceClassification(ConceptConfig(**{**SMALL, **options}))
    optimizer = torch.optim.AdamW(built.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        out = built(packed=pack(rows), packed_b=pack(others), labels=labels)
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    correlation = torch.corrcoef(torch.stack((out.logits.view(-1).detach(), labels)))[0, 1]
    assert losses[-1] < 0.25 * losses[0] and correlation > 0.95


