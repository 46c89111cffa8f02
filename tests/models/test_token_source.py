"""What is kept of a token: the same loss and gradients from keys, states or ids; less memory."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from conceptron.models.config import ConceptConfig
from conceptron.models.encoder import ConceptEncoder
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.packing import pack
from conceptron.models.token_source import FEW, what_is_kept

SMALL = dict(
    vocab_size=60, hidden_size=32, num_concepts=6, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
    num_decoder_layers=1, mask_token_id=3,
)  # fmt: skip
LENGTHS = (13, 0, 5, 5, 40, 1)
MANY = FEW + 1
PLAIN = {
    "default": {},
    "grouped heads": dict(num_key_value_heads=2, block_norm="sandwich"),
    "no segments": dict(init_queries="orthogonal"),
    "shared": dict(share_kv=2),
    "tied": dict(tie_layers=True, num_iterations=4, backprop_iterations=2),
    "yarn": dict(rope_extension="yarn", rope_factor=4.0),
}
OTHERS = {
    "token layers": dict(num_token_layers=1, token_window=4),
    "funnel": dict(num_token_layers=2, funnel=[1], token_window=4),
    "thin": dict(token_dim=16),
    "learned": dict(token_positions="learned"),
    "sinusoidal": dict(token_positions="sinusoidal"),
}


def encoder(dtype: torch.dtype = torch.float64, **options) -> ConceptEncoder:
    torch.manual_seed(0)
    return ConceptEncoder(ConceptConfig(**{**SMALL, **options})).to(dtype).train()


def batch(*lengths: int):
    generator = torch.Generator().manual_seed(1)
    return pack([torch.randint(4, 60, (n,), generator=generator) for n in lengths])


def results(model: ConceptEncoder, packed, keep: str | None, seed: int = 0) -> list[torch.Tensor]:
    model.keep = keep
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(packed=packed).last_hidden_state
    slope = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    (out * slope).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return [out.detach(), *(x.clone() for x in gradients if x is not None)]


def assert_same(found: list, expected: list) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-11 * (1 + b.abs().max())


@pytest.mark.parametrize("keep", ["states", "ids"])
@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN)
def test_the_same_loss_and_gradients(options, keep):
    model, packed = encoder(**options), batch(*LENGTHS)
    assert_same(results(model, packed, keep), results(model, packed, "keys"))


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_states_that_other_layers_have_made(options):
    model, packed = encoder(**options), batch(*LENGTHS)
    assert_same(results(model, packed, "states"), results(model, packed, "keys"))
    with pytest.raises(ValueError, match="keep: expected keys or states, got 'ids'"):
        results(model, packed, "ids")


@pytest.mark.parametrize("keep", ["states", "ids"])
def test_dropout_and_absent_tokens(keep):
    model = encoder(dropout=0.3)
    packed = batch(9, 30).select(torch.arange(39) % 3 != 1)
    assert_same(results(model, packed, keep), results(model, packed, "keys"))
    assert_same(results(model, batch(0, 0), keep)[:1], results(model, batch(0, 0), "keys")[:1])
    assert model(packed=pack([])).last_hidden_state.shape == (0, 6, 32)


@pytest.mark.parametrize("keep", ["states", "ids"])
def test_autocast_within_rounding(keep):
    model, packed, found = encoder(torch.float32), batch(*LENGTHS), {}
    for each in ("keys", keep):
        with torch.autocast("cpu", torch.bfloat16):
            found[each] = results(model, packed, each)
    exact = results(model, packed, "keys")
    for a, b, true in zip(found[keep], found["keys"], exact, strict=True):
        assert a.dtype == b.dtype
        assert (a - true).norm() <= 1.5 * (b - true).norm() + 0.02 * true.norm()


def kept_bytes(call, packed, model: ConceptEncoder) -> tuple[torch.Tensor, int]:
    """The concepts, and the bytes that autograd saves of one forward pass, each storage once."""
    seen = {}
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def save(x):
        seen[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(save, lambda x: x):
        out = call(packed=packed).last_hidden_state
    return out, sum(size for storage, size in seen.items() if storage not in own)


def test_bytes_of_a_token():
    model, slopes = encoder(torch.float32), {}
    for model.keep in ("keys", "states", "ids"):
        short, long = (kept_bytes(model, batch(length), model)[1] for length in (1000, 3000))
        slopes[model.keep] = (long - short) / 2000
    assert slopes["ids"] <= 16 and slopes["states"] <= 4 * 32 + 32 and slopes["keys"] > 10 * slopes["states"]


def test_defaults():
    assert encoder().kept_of_tokens(MANY) == "states" and encoder().kept_of_tokens(FEW) == "keys"
    for options in ({"tie_layers": True}, {"share_kv": 3}, {"layer_kind": "slot"}, {"layer_kind": "bixt"}):
        assert encoder(**options).kept_of_tokens(MANY) == "keys"
    model = encoder()
    model.layers[1].read.value = nn.Sequential(model.layers[1].read.value)  # an adapter
    assert model.kept_of_tokens(MANY) == "keys"


def test_what_cannot_be_kept_is_refused():
    model = encoder(layer_kind="slot")
    model.keep = "ids"
    with pytest.raises(ValueError, match="keep: expected keys with layer_kind = slot, got 'ids'"):
        model(packed=batch(4))
    model = encoder()
    model.keep = "nothing"
    with pytest.raises(ValueError, match="keep: expected one of keys, states, ids or None, got 'nothing'"):
        model(packed=batch(4))


@pytest.mark.parametrize("keep", ["states", "ids"])
def test_passes_that_end_early_leave_nothing_behind(keep):
    """A backward pass that never comes to the embeddings, one more over the same graph, two graphs that add up."""
    model, packed = encoder(), batch(*LENGTHS)
    expected = results(model, packed, "keys")[1:]
    model.keep = keep
    model.zero_grad()
    out = model(packed=packed).last_hidden_state
    slope = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    torch.autograd.grad((out * slope).sum(), model.layers[1].read.value.weight, retain_graph=True)
    (out * slope).sum().backward(retain_graph=True)
    assert_same([p.grad for p in model.parameters()], expected)
    (out * slope).sum().backward()
    assert_same([p.grad / 2 for p in model.parameters()], expected)
    with pytest.raises(RuntimeError, match="second time"):
        (out * slope).sum().backward()


@pytest.mark.parametrize("keep", ["states", "ids"])
def test_one_derivative_only(keep):
    model = encoder()
    model.keep = keep
    out = model(packed=batch(5, 9)).last_hidden_state
    (slope,) = torch.autograd.grad(out.square().sum(), model.layers[0].read.value.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("keep", ["states", "ids"])
def test_frozen_embeddings(keep):
    model, packed = encoder(), batch(*LENGTHS)
    model.embed_tokens.weight.requires_grad_(False)
    model.token_norm.weight.requires_grad_(False)
    assert_same(results(model, packed, keep), results(model, packed, "keys"))


def test_a_hook_on_the_embeddings_is_called():
    model, seen = encoder(), []
    model.embed_tokens.register_forward_hook(lambda *args: seen.append(1))
    model(packed=batch(4))
    assert seen


def test_compiled_it_is_the_plain_form(monkeypatch):
    """Of which test_combinations.py compiles every kind; what is asked for by name is done."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    model = encoder()
    assert model.kept_of_tokens(MANY) == "keys"
    model.keep = "ids"
    assert model.kept_of_tokens(MANY) == "ids"


@pytest.mark.parametrize(("options", "keep"), [
    ({"num_hidden_layers": 1}, "states"), ({"tie_layers": True, "num_iterations": 2}, "ids"),
])  # fmt: skip
def test_compiled_and_asked_for_it_is_kept(options, keep):
    """The same results, and of a token a state at most."""
    torch._dynamo.reset()
    model, packed = encoder(**options), batch(1200, 800)
    expected = results(model, packed, "keys")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    model.keep = keep
    model.zero_grad()
    out, size = kept_bytes(compiled, packed, model)
    slope = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    (out * slope).sum().backward()
    assert_same([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], expected)
    assert size < 2000 * (8 * 32 + 32)


@pytest.mark.parametrize("keep", ["states", "ids"])
def test_what_wrapped_layers_cannot_keep_is_refused(keep):
    for wrap in (
        lambda read: setattr(read, "value", nn.Sequential(read.value)),  # an adapter
        lambda read: read.key.project.register_forward_hook(lambda *args: None),
        lambda read: setattr(read.value.weight, "ds_id", 1),  # as ZeRO-3 marks what it has cut
    ):
        model = encoder()
        wrap(model.layers[1].read)
        assert model.kept_of_tokens(MANY) == "keys"
        model.keep = keep
        with pytest.raises(ValueError, match=f"keep: expected keys or None, got '{keep}': projections of keys"):
            model(packed=batch(4))
    with pytest.raises(ValueError, match=f"keep: expected keys or None for a text over several devices, got '{keep}'"):
        what_is_kept(model.config, keep, True, True, True, MANY)


@pytest.mark.parametrize("keep", ["states", "ids"])
def test_what_was_read_is_gone_with_its_pass(keep):
    """At once, without the garbage collector: nothing of it is in a circle."""
    model, seen = encoder(), []
    model.keep = keep
    model.token_reader.register_forward_hook(lambda module, inputs, source: seen.append(weakref.ref(source.shared)))
    gc.disable()
    try:
        out = model(packed=batch(*LENGTHS)).last_hidden_state
        assert out.requires_grad
        out.sum().backward()
        del out
        assert [reference() for reference in seen] == [None]
    finally:
        gc.enable()


CHECKPOINTED = {
    "default": {}, "bixt": dict(layer_kind="bixt"), "slot": dict(layer_kind="slot"),
    "tied": dict(tie_layers=True, num_iterations=3), "local": dict(decoder_mixing="local"),
    "exchange": dict(decoder_mixing="concepts", timestep_conditioning=True), "shared": dict(share_kv=3),
    "funnel": dict(num_token_layers=2, funnel=[1], token_window=4),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers is to rename it
@pytest.mark.parametrize("options", CHECKPOINTED.values(), ids=CHECKPOINTED)
def test_gradient_checkpointing_changes_nothing_but_memory(options):
    torch.manual_seed(0)
    model = ConceptForMaskedLM(ConceptConfig(**{**SMALL, "dropout": 0.2, "num_decoder_layers": 2, **options})).double()
    ids = torch.randint(4, 60, (2, 24))
    found, kept = [], []
    for checkpoints in (False, True):
        if checkpoints:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model.train().zero_grad()
        torch.manual_seed(5)
        sizes = {}

        def save(x, sizes=sizes):
            sizes[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
            return x

        with saved_tensors_hooks(save, lambda x: x):
            loss = model(ids, labels=ids).loss
        loss.backward()
        kept.append(sum(sizes.values()))
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert_same(*found[::-1])
    assert kept[1] < 0.75 * kept[0]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_reentrant_checkpoints_are_refused():
    with pytest.raises(ValueError, match="use_reentrant: expected False"):
        encoder().gradient_checkpointing_enable({"use_reentrant": True})
