"""ConceptForMaskedLM: both doors, the loss, tied weights, saving, and what ZeRO-3 asks of a model."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import AutoModel, AutoModelForMaskedLM

from conceptron.models.config import ConceptConfig
from conceptron.models.encoder import ConceptEncoder
from conceptron.models.layers import ZeroLinear
from conceptron.models.masked_lm import ConceptForMaskedLM, smoothing_floor
from conceptron.models.objectives import Diffusion, MaskedLM, SampleKey, SpecialTokens
from conceptron.models.packing import pack

SMALL = dict(
    vocab_size=60, hidden_size=32, num_concepts=6, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
    num_decoder_layers=1, timestep_conditioning=True, mask_token_id=3, pad_token_id=0,
)  # fmt: skip
TOKENS = SpecialTokens(3, frozenset({0, 1, 2, 3}), 60)


MIXED = (
    {"decoder_mixing": "local", "decoder_window": 3},
    {"decoder_mixing": "concepts"},
    {"decoder_mixing": "concepts", "decoder_queries": "weighted"},
)


def model(**options) -> ConceptForMaskedLM:
    torch.manual_seed(0)
    built = ConceptForMaskedLM(ConceptConfig(**{**SMALL, **options})).double().eval()
    with torch.no_grad():  # open the gates, so that every parameter matters
        for module in built.modules():
            if isinstance(module, ZeroLinear):
                module.weight.normal_(std=0.1)
                module.bias.normal_(std=0.1)
    return built


def texts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, 60, (n,), generator=generator) for n in lengths]


def view(objective=None, lengths=(20, 0, 7)):
    keys = [SampleKey(0, 0, i) for i in range(len(lengths))]
    return (objective or Diffusion()).view(pack(texts(*lengths)), keys, TOKENS)


def padded(lengths=(9, 14, 3), width=16):
    """ids, mask, labels: some tokens masked and asked for."""
    ids, mask, labels = torch.zeros(3, width, dtype=torch.int64), torch.zeros(3, width), torch.full((3, width), -100)
    for row, text in enumerate(texts(*lengths)):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
        labels[row, 1 : len(text) : 3] = text[1::3]
    ids[labels != -100] = 3
    return ids, mask, labels


def gradients(built: ConceptForMaskedLM, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    built.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in built.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_written_out_one(smoothing):
    """Against full logits and torch's cross entropy: value, per-target losses and every gradient."""
    built, given = model(), view(Diffusion(weighting="mdlm"))
    out = built(view=given, smoothing=smoothing, return_nll=True)
    encoded = built.encoder(packed=given.encoder)
    hidden = built.decode(encoded, given.decoder_position_ids, given.decoder_cu_seqlens, given.decoder_max_seqlen,
                          given.decoder_input_ids, given.timesteps)  # fmt: skip
    nll = torch.nn.functional.cross_entropy(
        built.lm_head(hidden), given.targets, reduction="none", label_smoothing=smoothing
    )
    expected = (given.weights * nll).sum() / given.divisor
    assert out.logits is None and out.nll.dtype == torch.float32
    assert torch.allclose(out.nll, nll.float(), atol=1e-5) and torch.allclose(out.loss.double(), expected, rtol=1e-5)
    lean = built(view=given, smoothing=smoothing).loss
    assert torch.allclose(lean, expected, rtol=1e-5)
    want, got = gradients(built, expected), gradients(built, lean)
    assert want.keys() == got.keys()
    for name in want:
        assert torch.allclose(got[name], want[name], rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("smoothing, V", [(0.1, 50368), (0.3, 7)])
def test_no_smoothed_loss_is_below_its_floor(smoothing, V):
    """The best logits are the logarithm of the smoothed target; torch's own loss of these is the floor."""
    target = torch.full((1, V), smoothing / V, dtype=torch.float64)
    target[0, 3] += 1 - smoothing
    best, floor = target.log(), smoothing_floor(smoothing, V)
    losses = [
        float(torch.nn.functional.cross_entropy(logits, torch.tensor([3]), label_smoothing=smoothing))
        for logits in (best, best.clone().index_fill_(1, torch.tensor([3]), 1.0), torch.zeros_like(best))
    ]
    assert losses[0] == pytest.approx(floor, abs=1e-9) and min(losses[1:]) > floor
    assert V == 7 or floor == pytest.approx(1.4077, abs=1e-4)  # where losses of a solved copying task seemed stuck
    assert smoothing_floor(0.0, V) == 0


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator returned, backward included."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t.numel() for t in tree_flatten(out)[0] if isinstance(t, torch.Tensor)]
        self.num_elements = max(self.num_elements, *made, 0)
        return out


def test_a_training_step_never_holds_the_logits(monkeypatch):
    monkeypatch.setenv("CONCEPTRON_LCE_CHUNK_MB", "0.25")
    built, V = model(vocab_size=4096, timestep_conditioning=False).float().train(), 4096
    tokens, keys = TOKENS._replace(vocab_size=V), [SampleKey(0, 0, i) for i in range(4)]
    given = MaskedLM().view(pack(texts(*[150] * 4)), keys, tokens)
    with Largest() as ours:
        built(view=given).loss.backward()
    assert ours.num_elements <= V * 32 < given.num_targets * V / 4  # the table of embeddings, and its gradient


def test_only_asked_rows_are_decoded_and_the_result_is_that_of_all_rows():
    """Sparse equals dense: labels with -100 against the logits of every position."""
    built, (ids, mask, labels) = model(), padded()
    dense = built(ids, mask).logits
    assert dense.shape == (3, 16, 60) and (dense[mask == 0] == 0).all()
    expected = torch.nn.functional.cross_entropy(dense.flatten(0, 1), labels.flatten())
    rows = []
    built.decoder.norms[0].register_forward_hook(lambda module, args, out: rows.append(args[0].shape[0]))
    sparse = built.train()(ids, mask, labels=labels)
    assert rows == [int((labels != -100).sum())]
    assert sparse.logits is None and torch.allclose(sparse.loss, expected, rtol=1e-6)
    want, got = gradients(built, expected), gradients(built, sparse.loss)
    assert all(torch.allclose(got[name], want[name], rtol=1e-5, atol=1e-9) for name in want)
    evaluated = built.eval()(ids, mask, labels=labels, return_nll=True)
    assert torch.equal(evaluated.logits, dense) and evaluated.nll.shape == (rows[0],)


@pytest.mark.parametrize("mixing", ["local", "concepts"])
def test_a_decoder_that_mixes_rows_gets_the_known_ones_through_every_door(mixing):
    """The loss of the padded door is that of its logits, which know all rows, and of a view with context."""
    built, (ids, mask, labels) = model(decoder_mixing=mixing, hidden_tokens="mask"), padded()
    out = built(ids, mask, labels=labels, return_nll=True)
    asked = labels != -100
    expected = -out.logits[asked].log_softmax(-1).gather(1, labels[asked][:, None])[:, 0]
    assert torch.allclose(out.nll.double(), expected, atol=1e-6)
    given = Diffusion(hidden="mask", context=True).view(pack(texts(12)), [SampleKey(0, 0, 0)], TOKENS)
    shown = given.decoder_input_ids[None]
    logits = built(shown, timesteps=given.timesteps).logits[0, given.target_rows]
    nll = -logits.log_softmax(-1).gather(1, given.targets[:, None])[:, 0]
    assert 0 < given.num_targets < 12
    assert torch.allclose(built(view=given, return_nll=True).nll.double(), nll, atol=1e-6)
    alone = replace(
        given, target_rows=None, decoder_input_ids=shown[0, given.target_rows],
        decoder_position_ids=given.decoder_position_ids[given.target_rows],
        decoder_cu_seqlens=torch.tensor([0, given.num_targets], dtype=torch.int32),
    )  # fmt: skip
    assert not torch.allclose(built(view=alone, return_nll=True).nll.double(), nll, atol=1e-4)


def test_padding_and_batch_change_nothing():
    built, (ids, mask, labels) = model(), padded()
    wide = [torch.nn.functional.pad(x, (4, 9), value=v) for x, v in ((ids, 0), (mask, 0), (labels, -100))]
    tight, loose = built(ids, mask, labels=labels), built(*wide[:2], labels=wide[2])
    assert torch.allclose(loose.loss, tight.loss, rtol=1e-9)
    assert torch.allclose(loose.logits[:, 4:20], tight.logits, atol=1e-9)
    alone = built(ids[1:2], mask[1:2]).logits
    assert torch.allclose(alone[0], tight.logits[1], atol=1e-9)


def test_the_two_doors_agree():
    """The padded door with labels equals the view of the same masks with equal weights; t is the share of [MASK]."""
    built = model()
    given = view(Diffusion(weighting="none"), lengths=(20, 9, 7))
    share = given.decoder_cu_seqlens.diff() / torch.tensor([20, 9, 7])
    ids, mask, labels = torch.zeros(3, 20, dtype=torch.int64), torch.zeros(3, 20), torch.full((3, 20), -100)
    for row, text in enumerate(texts(20, 9, 7)):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
        asked = given.decoder_position_ids[slice(*given.decoder_cu_seqlens[row : row + 2].tolist())]
        labels[row, asked], ids[row, asked] = text[asked], 3
    expected = built(view=replace(given, timesteps=share)).loss
    assert torch.allclose(built(ids, mask, labels=labels).loss, expected, rtol=1e-6)
    assert torch.allclose(built(ids, mask, labels=labels, timesteps=share).loss, expected, rtol=1e-6)


def test_the_trainer_of_transformers_may_name_the_divisor():
    built, (ids, mask, labels) = model(), padded()
    count = int((labels != -100).sum())
    mean = built(ids, mask, labels=labels).loss
    parts = [
        built(ids[i : i + 1], mask[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count).loss
        for i in range(3)
    ]
    assert torch.allclose(sum(parts), mean, rtol=1e-6) and ConceptForMaskedLM.accepts_loss_kwargs


def test_nothing_asked_is_loss_zero():
    built, (ids, mask, labels) = model().train(), padded()
    loss = built(ids, mask, labels=torch.full_like(labels, -100)).loss
    loss.backward()
    assert loss == 0 and all(p.grad is None or (p.grad == 0).all() for p in built.parameters())


def test_tied_weights_gather_gradients_from_every_use():
    """Embedding of what is read, embedding of the query, output matrix: their gradients add up in one parameter."""
    tied = model()
    assert tied.lm_head.weight is tied.encoder.embed_tokens.weight is tied.decoder.embed_tokens.weight
    free = model(tie_word_embeddings=False)
    names = ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    free.load_state_dict({**tied.state_dict(), **{name: tied.lm_head.weight.detach().clone() for name in names}})
    assert free.lm_head.weight is not free.encoder.embed_tokens.weight
    given = view()
    one, three = gradients(tied, tied(view=given).loss), gradients(free, free(view=given).loss)
    assert all(three[name].abs().max() > 0 for name in names)
    assert torch.allclose(one["encoder.embed_tokens.weight"], sum(three[name] for name in names), atol=1e-9)


def test_an_untied_model_is_initialised_too():
    torch.manual_seed(0)
    free = ConceptForMaskedLM(ConceptConfig(**{**SMALL, "tie_word_embeddings": False, "vocab_size": 3000}))
    for weight in (free.lm_head.weight, free.encoder.embed_tokens.weight, free.decoder.embed_tokens.weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert (free.lm_head.bias == 0).all()


@pytest.mark.parametrize(
    "options",
    [{}, {"decoder_queries": "position"}, {"tie_word_embeddings": False}, {"decoder_mixing": "local"},
     {"decoder_queries": "weighted", "decoder_mixing": "concepts", "condition_dropout": 0.1}], ids=str,
)  # fmt: skip
def test_saved_and_loaded_bit_for_bit(tmp_path, options):
    built, (ids, mask, _) = model(**options).float(), padded()
    built.save_pretrained(tmp_path)
    assert [path.suffix for path in tmp_path.glob("model*")] == [".safetensors"]
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(loaded) is ConceptForMaskedLM and not loaded.training
    state = built.state_dict()
    assert state.keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert (loaded.lm_head.weight is loaded.encoder.embed_tokens.weight) == built.config.tie_word_embeddings
    assert torch.equal(loaded(ids, mask).logits, built(ids, mask).logits)
    encoder = AutoModel.from_pretrained(tmp_path)
    assert type(encoder) is ConceptEncoder
    assert torch.equal(encoder(ids, mask).last_hidden_state, built(ids, mask).concepts)


@pytest.mark.parametrize("options", [{}, *MIXED], ids=str)
def test_every_parameter_is_read_inside_its_own_module(options):
    """ZeRO-3 gathers a module's weights around that module's forward only: elsewhere they have no elements here."""
    built = model(**options)
    expected = built(view=view()).loss.item()
    whole = {parameter: parameter.data for parameter in built.parameters()}

    def gather(module, *_):
        for parameter in module.parameters(recurse=False):
            parameter.data = whole[parameter]

    def release(module, *_):
        for parameter in module.parameters(recurse=False):
            parameter.data = whole[parameter].new_empty(0)

    for module in built.modules():
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        release(module)
    with torch.no_grad():
        assert float(built(view=view()).loss) == pytest.approx(expected, rel=1e-12)


def test_every_parameter_gets_a_gradient():
    """A parameter without one would be dead weight, and would hang a reduction that waits for it."""
    for objective, options in (
        (Diffusion(), {}),
        (MaskedLM(), {"timestep_conditioning": False, "decoder_queries": "position"}),
        *((Diffusion(context=True), options) for options in MIXED),
    ):
        built = model(**options)
        got = gradients(built, built(view=view(objective)).loss)
        missing = [name for name, _ in built.named_parameters() if name not in got or not got[name].abs().max() > 0]
        assert missing == []


@pytest.mark.parametrize("options", [{}, {"timestep_conditioning": False}], ids=str)
def test_it_learns_what_it_is_shown(options):
    """Auto-encoding of a few texts from a fresh model: the loss falls well below that of knowing the words only."""
    torch.manual_seed(0)
    built = ConceptForMaskedLM(ConceptConfig(**{**SMALL, **options}))
    optimizer = torch.optim.AdamW(built.parameters(), lr=1e-2)
    given = Diffusion(encoder_view="clean", weighting="none").view_at(
        torch.ones(8).numpy(), pack(texts(*[12] * 8)), [SampleKey(0, 0, i) for i in range(8)], TOKENS
    )
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = built(view=given).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3.9 and losses[-1] < 0.5


def test_the_vocabulary_can_grow(tmp_path):
    built, (ids, mask, _) = model().float(), padded()
    before = built(ids, mask).logits
    built.resize_token_embeddings(64)
    after = built(ids, mask).logits
    assert after.shape[-1] == 64 and torch.equal(after[..., :60], before)
    assert built.lm_head.weight is built.encoder.embed_tokens.weight and built.config.vocab_size == 64
    built.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForMaskedLM.from_pretrained(tmp_path)(ids, mask).logits, after)


def test_it_is_one_graph_for_every_batch():
    """torch.compile without a break, and no new graph for other lengths."""
    built = model(timestep_conditioning=False, **MIXED[0]).float()
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(built, fullgraph=True, backend="eager", dynamic=True)
    for lengths in ((20, 9, 7), (11, 12, 30), (2, 5, 3)):
        given = view(lengths=lengths)
        assert torch.allclose(compiled(view=given).loss, built(view=given).loss, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_training_never_returns_logits_and_wrong_calls_are_refused():
    built, (ids, mask, labels) = model().train(), padded()
    assert built(view=view()).logits is None and built(ids, mask, labels=labels).logits is None
    with pytest.raises(ValueError, match="either input_ids"):
        built()
    with pytest.raises(ValueError, match="either input_ids"):
        built(ids, view=view())
    with pytest.raises(ValueError, match=r"labels: expected input_ids' shape \[3, 16\]"):
        built(ids, mask, labels=labels[:, :4])
    with pytest.raises(ValueError, match="timesteps"):
        built(view=view(MaskedLM()))
    with pytest.raises(ValueError, match=r"timesteps: config.mask_token_id"):
        model(mask_token_id=None)(ids, mask)


def test_concepts_can_be_asked_about_later():
    """Encoding once and decoding rows by hand gives the logits of the whole."""
    built, (ids, mask, _) = model(timestep_conditioning=False), padded()
    whole = built(ids, mask)
    hidden = built.decoder(
        whole.concepts, built.encoder(ids, mask).anchors, torch.tensor([4]),
        torch.tensor([0, 0, 1, 1], dtype=torch.int32), 1, input_ids=ids[1, 4:5],
    )  # fmt: skip
    assert torch.allclose(built.lm_head(hidden)[0], whole.logits[1, 4], atol=1e-10)
