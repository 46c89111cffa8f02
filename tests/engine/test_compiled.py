"""Compiled layers: how many graphs all batches need, that they learn the same, and what refuses them."""


import logging
import shutil

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from conceptron.engine.compiled import check_compiler, compile_layers
from conceptron.engine.errors import InputError
from conceptron.models.config import ConceptConfig
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.objectives import OBJECTIVES, SampleKey, SpecialTokens, View
from conceptron.models.packing import pack

TOKENS = SpecialTokens(mask_id=1, special_ids=frozenset({0, 1}), vocab_size=97)
SHAPE = dict(
    vocab_size=97, hidden_size=30, num_concepts=5, num_hidden_layers=2, num_attention_heads=3, intermediate_size=33,
    num_decoder_layers=1, mask_token_id=1, dropout=0.0,
)  # fmt: skip
MODELS = {  # fields, and graphs: of each kind of layer and place among them, of the decoder, and of its one window
    "bixt behind token layers": (
        dict(layer_kind="bixt", num_token_layers=1, token_window=4, decoder_mixing="local", decoder_window=4), 4, 1,
    ),
    "tied slots with timesteps": (
        dict(layer_kind="slot", tie_layers=True, timestep_conditioning=True, decoder_mixing="concepts"), 3, 0,
    ),
}  # fmt: skip
# ragged, with an empty text, as many texts as heads, as many tokens as another size, and rows that nobody asks for
SEVERAL = ((7, 40), (30, 30, 12), (9, 0, 44), (3, 9, 10, 44, 2))
ONE = ((23,), (41,))
MORE = ((), (11, 29, 5), (37,))  # of the second model, whose graphs are fewer


def view(lengths: tuple[int, ...]) -> View:
    generator = np.random.default_rng(sum(lengths))
    batch = pack([generator.integers(2, 97, size=n) for n in lengths])
    keys = [SampleKey(0, sum(lengths), j) for j in range(len(lengths))]
    return OBJECTIVES["diffusion"]().view(batch, keys, TOKENS)


def build(**fields) -> ConceptForMaskedLM:
    torch.manual_seed(0)
    model = ConceptForMaskedLM(ConceptConfig(**{**SHAPE, **fields})).double().train()
    model.encoder.keep = "keys"
    return model


@pytest.fixture(autouse=True)
def anew(caplog):
    """A compiler that knows nothing yet, and none of its traces in pytest's log, which take most of the time."""
    caplog.set_level(logging.CRITICAL, "torch.__trace")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", MODELS)
def test_one_graph_serves_every_length(name):
    fields, num_graphs, of_one_window = MODELS[name]
    plain, model, counter = build(**fields), build(**fields), CompileCounterWithBackend("eager")
    compile_layers(model, counter)
    counts, more = [], () if of_one_window else (*ONE, *MORE)
    for lengths in (*SEVERAL, *more):
        losses = []
        for each in (plain, model):
            each.zero_grad()
            loss = each(view=view(lengths)).loss
            loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses)
        for (parameter, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), parameter
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, msg=parameter)
        counts.append(counter.frame_count)
    assert counts[0] == num_graphs and counts[len(SEVERAL) - 1] == num_graphs + of_one_window
    if more:
        assert counts[-1] == counts[-1 - len(MORE)] <= 2 * num_graphs  # once more for a text by itself


def test_the_kernels_of_a_cpu_compute_the_same():
    """Inductor's, of the encoder alone: C++ is built once for the graph, and every length takes it."""
    if not shutil.which("g++"):
        pytest.skip("no g++")
    plain, model = (build().encoder.float() for _ in range(2))
    compile_layers(model)
    for lengths in SEVERAL:
        packed, found = view(lengths).encoder, []
        for each in (plain, model):
            each.zero_grad()
            out = each(packed=packed).last_hidden_state
            out.square().sum().backward()
            found.append([out.detach(), *(p.grad for p in each.parameters() if p.grad is not None)])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


def test_evaluation_is_not_compiled():
    model, counter = build(), CompileCounterWithBackend("eager")
    compile_layers(model, counter)
    with torch.no_grad():
        model.eval()(view=view((7, 40)))
    assert counter.frame_count == 0


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers is to rename it
def test_recomputed_layers_are_compiled_too():
    """Gradient checkpointing inside: the same gradients as without either, from less memory."""
    gradients, kept = [], []
    for is_both in (False, True):
        model, sizes = build(num_hidden_layers=1), {}
        if is_both:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            compile_layers(model, "eager")

        def save(x, sizes=sizes):
            sizes[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
            loss = model(view=view((30, 30, 12))).loss
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        kept.append(sum(sizes.values()))
    torch.testing.assert_close(*gradients)
    assert kept[1] < 0.8 * kept[0]


def test_without_a_compiler_it_is_refused(monkeypatch):
    for variable in ("CXX", "CC"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match=r"train\.compile: expected false without a C\+\+ compiler"):
        check_compiler("cpu")
    with pytest.raises(InputError, match="without a C compiler"):
        check_compiler("cuda")
    monkeypatch.setenv("CXX", "/bin/sh")
    check_compiler("cpu")
