"""The door: padded, flattened, embedded and packed texts are one and the same; traced without a look at the data."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from conceptron.models.config import ConceptConfig
from conceptron.models.door import open_door
from conceptron.models.encoder import ConceptEncoder
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.packing import pack
from conceptron.models.tasks.heads import (
    ConceptForMultipleChoice,
    ConceptForQuestionAnswering,
    ConceptForSequenceClassification,
)
from conceptron.models.tasks.tokens import ConceptForTokenClassification

SMALL = dict(
    vocab_size=60, hidden_size=32, num_concepts=6, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
    num_decoder_layers=1, mask_token_id=3, pad_token_id=0, num_labels=3,
)  # fmt: skip
LENGTHS = (9, 14, 3)
HEADS = (ConceptForSequenceClassification, ConceptForQuestionAnswering, ConceptForTokenClassification)


def model(kind=ConceptEncoder, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    built = kind(ConceptConfig(**{**SMALL, **options})).double().eval()
    with torch.no_grad():
        for name in ("classifier", "qa_outputs"):
            if hasattr(built, name):
                getattr(built, name).weight.normal_()
    return built


def texts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 60, (n,), generator=generator) for n in LENGTHS]


def padded(width: int = 16) -> dict[str, torch.Tensor]:
    ids, mask = torch.zeros(len(LENGTHS), width, dtype=torch.int64), torch.zeros(len(LENGTHS), width, dtype=torch.int64)
    for row, text in enumerate(texts()):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def collated() -> dict:
    """What transformers makes of the texts for packed training."""
    rows = [{"input_ids": text.tolist(), "labels": text.tolist()} for text in texts()]
    return dict(DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows))


@pytest.mark.parametrize("kind", [ConceptEncoder, ConceptForMaskedLM, *HEADS])
def test_the_flattening_collator_s_batch_is_the_padded_one(kind):
    built, batch = model(kind), collated()
    assert batch["input_ids"].shape == (1, sum(LENGTHS)) and {"cu_seq_lens_q", "max_length_q"} <= batch.keys()
    labels = batch.pop("labels")
    want, got = built(**padded()), built(**batch)
    valid = padded()["attention_mask"] != 0
    for name in want.keys() - {"loss"}:
        a, b = want[name], got[name]
        assert torch.allclose(a[valid] if a.shape[:2] == valid.shape else a, b[0] if b.shape[0] == 1 else b, atol=1e-9)
    inferred = built(batch["input_ids"], position_ids=batch["position_ids"])
    assert torch.allclose(inferred[0], got[0], atol=1e-12)
    counted = built(batch["input_ids"], cu_seq_lens_q=batch["cu_seq_lens_q"])
    assert torch.allclose(counted[0], got[0], atol=1e-12)
    if kind is ConceptForMaskedLM:
        by_text = built(**padded(), labels=torch.where(valid, padded()["input_ids"], -100))
        assert torch.allclose(built(**batch, labels=batch["input_ids"]).loss, by_text.loss, atol=1e-9)
        assert built(**batch, labels=labels).loss > 0  # the collator's own: the first token of each text not asked


def test_choices_may_come_end_to_end_too():
    built, rows = model(ConceptForMultipleChoice), padded()
    ids, mask = (torch.stack((x, x.flip(0)))[:, :2] for x in rows.values())
    want = built(ids, mask).logits
    flat = pack([row[keep != 0] for row, keep in zip(ids.flatten(0, 1), mask.flatten(0, 1), strict=True)])
    got = built(flat.input_ids[None], cu_seq_lens_q=flat.cu_seqlens, max_length_q=flat.max_seqlen, num_choices=2)
    assert want.shape == (2, 2) and torch.allclose(got.logits, want, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"token_dim": 16, "num_token_layers": 1}, {"decoder_queries": "position"}])
@pytest.mark.parametrize("kind", [ConceptEncoder, ConceptForMaskedLM, *HEADS])
def test_embeddings_in_place_of_ids(kind, options):
    """Through the same packing; where ids would be dropped ([MASK]), the caller's mask has to leave them out."""
    built, batch = model(kind, hidden_tokens="mask", **options), padded()
    embeds = built.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    want = built(**batch)
    got = built(inputs_embeds=embeds, attention_mask=batch["attention_mask"])
    assert torch.allclose(got[0], want[0], atol=1e-9)
    got[0].square().sum().backward()
    slopes = embeds.grad.abs().sum(-1)
    assert ((slopes > 0) == (batch["attention_mask"] != 0)).all()


def test_token_states_are_what_the_head_reads():
    built, batch = model(ConceptForTokenClassification), padded()
    out = built(**batch, output_token_states=True, labels=torch.where(batch["attention_mask"] != 0, 2, -100))
    valid = batch["attention_mask"] != 0
    assert out.token_states.shape == (3, 16, 32) and (out.token_states[~valid] == 0).all()
    assert torch.allclose(built.classifier(out.token_states)[valid], out.logits[valid])
    want = torch.nn.functional.cross_entropy(out.logits[valid], torch.full((sum(LENGTHS),), 2))
    assert torch.allclose(out.loss, want)
    asked = model(ConceptForMaskedLM)
    states = asked(**batch, output_token_states=True)
    assert torch.allclose(asked.lm_head(states.token_states)[valid], states.logits[valid])


def test_a_padded_batch_is_one_graph():
    """Whatever the mask says; what it says is read by the operators only."""
    built, batch = model(ConceptForMaskedLM).float(), padded()
    traced = torch.compile(built, fullgraph=True, backend="eager")
    assert torch.allclose(traced(**batch).logits, built(**batch).logits, atol=1e-5)


def test_a_padded_batch_trains_in_one_graph():
    """The caller says how long texts are at most; the gradients are those of the call that looks."""
    built, batch = model(ConceptForMaskedLM), padded()
    batch["labels"] = torch.where(batch["attention_mask"] != 0, batch["input_ids"], -100)
    torch._dynamo.reset()
    traced, found = torch.compile(built, fullgraph=True, backend="aot_eager"), []
    for call, lengths in ((built, {}), (traced, {"max_length_q": 14})):
        loss = call(**batch, **lengths).loss
        found.append([loss.detach(), *torch.autograd.grad(loss, list(built.parameters()), allow_unused=True)])
    for want, got in zip(*found, strict=True):
        assert (want is None and got is None) or torch.allclose(want, got, atol=1e-10)


@pytest.mark.parametrize("kind, name", [
    (ConceptEncoder, "pooler_output"), (ConceptForMaskedLM, "logits"), (ConceptForSequenceClassification, "logits"),
])  # fmt: skip
def test_an_exported_program_takes_other_masks(kind, name):
    built, batch = model(kind).float(), padded()
    program = torch.export.export(built, (), batch, strict=False).module()
    for mask in (batch["attention_mask"], torch.ones(3, 16, dtype=torch.int64), torch.zeros(3, 16, dtype=torch.int64)):
        given = {**batch, "attention_mask": mask}
        assert torch.allclose(program(**given)[name], built(**given)[name], atol=1e-5)


@pytest.mark.parametrize("given, words", [
    ({}, "input_ids: expected either input_ids or packed"),
    ({"input_ids": torch.ones(2, 4), "inputs_embeds": torch.ones(2, 4, 8)}, "got several"),
    ({"inputs_embeds": torch.ones(2, 4)}, r"inputs_embeds: expected shape \[B, N, e\], got \[2, 4\]"),
    ({"input_ids": torch.ones(2, 4, dtype=torch.int64), "cu_seq_lens_q": torch.tensor([0, 4])}, r"shape \[1, T\]"),
    ({"input_ids": torch.ones(1, 4, dtype=torch.int64), "cu_seq_lens_q": torch.tensor([[0, 4]])}, "cu_seq_lens_q: "),
    ({"input_ids": torch.ones(1, 4, dtype=torch.int64), "cu_seq_lens_q": torch.tensor([0, 4]),
      "attention_mask": torch.ones(1, 4)}, "attention_mask: expected nothing with cu_seq_lens_q"),
    ({"input_ids": torch.ones(2, 4, dtype=torch.int64), "position_ids": torch.ones(2, 3)}, "position_ids: expected"),
    ({"input_ids": torch.ones(2, 4, dtype=torch.int64), "max_length_q": torch.tensor(4)}, "max_length_q: .*got Tensor"),
    ({"packed": pack([[1, 2]]), "attention_mask": torch.ones(1, 2)}, "attention_mask: expected nothing with packed"),
])  # fmt: skip
def test_what_fits_no_form_is_refused_by_name(given, words):
    with pytest.raises(ValueError, match=words):
        open_door(**given)


def test_embeddings_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"inputs_embeds: expected shape \[B, N, 32\].*got a width of 8"):
        model()(inputs_embeds=torch.ones(1, 4, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="timesteps: expected"):
        model(ConceptForMaskedLM, timestep_conditioning=True)(inputs_embeds=torch.ones(1, 4, 32, dtype=torch.float64))
