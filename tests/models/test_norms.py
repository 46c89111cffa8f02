"""Norms under autocast: one dtype for rows and weight, one cast for all that read them."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from conceptron.models.config import ConceptConfig
from conceptron.models.encoder import ConceptEncoder
from conceptron.models.layers import BranchNorm, RowNorm
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.objectives import Diffusion, SampleKey, SpecialTokens
from conceptron.models.packing import pack
from conceptron.models.tasks.heads import ConceptForSequenceClassification

SMALL = dict(
    vocab_size=60, hidden_size=32, num_concepts=6, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
    num_decoder_layers=1, mask_token_id=3, num_labels=2,
)  # fmt: skip
TOKENS = SpecialTokens(3, frozenset({0, 1, 2, 3}), 60)
BF16 = torch.bfloat16


def build(kind, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return kind(ConceptConfig(**{**SMALL, **options}))


def texts(*lengths: int):
    generator = torch.Generator().manual_seed(1)
    return pack([torch.randint(4, 60, (n,), generator=generator) for n in lengths])


class Norms(TorchFunctionMode):
    """(dtype of the rows, of the weight) of every RMSNorm that has one."""

    def __init__(self):
        super().__init__()
        self.seen: set[tuple[torch.dtype, torch.dtype]] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.nn.functional.rms_norm and kwargs["weight"] is not None:
            self.seen.add((args[0].dtype, kwargs["weight"].dtype))
        return function(*args, **kwargs)


def test_rows_are_normalised_as_wide_as_the_weight_and_branches_cast():
    x = torch.randn(5, 8, dtype=BF16)
    stream, branch = RowNorm(8, eps=1e-6), BranchNorm(8, eps=1e-6)
    expected = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    with torch.autocast("cpu", BF16):
        assert torch.allclose(stream(x), expected, atol=1e-6)
        assert torch.equal(branch(x), expected.to(BF16))
    assert torch.equal(branch(x), stream(x))
    assert branch.double()(x.double()).dtype == torch.float64
    assert branch.bfloat16()(x).dtype == BF16


@pytest.mark.parametrize("options", [
    {"layer_kind": "cross", "block_norm": "sandwich", "token_dim": 16},
    {"layer_kind": "bixt", "num_token_layers": 1},
    {"layer_kind": "hybrid", "decoder_mixing": "local", "decoder_queries": "position"},
], ids=str)  # fmt: skip
def test_no_norm_gets_rows_of_another_dtype(options):
    """Where they differ, torch's fused kernel is not used."""
    model = build(ConceptForMaskedLM, **options)
    view = Diffusion(context="decoder_mixing" in options).view(
        texts(12, 9), [SampleKey(0, 0, i) for i in range(2)], TOKENS
    )
    task = build(ConceptForSequenceClassification, pool="multi_query", **options)
    with Norms() as norms, torch.autocast("cpu", BF16):
        model(view=view)
        task(packed=texts(12, 9))
    assert norms.seen == {(torch.float32, torch.float32)}


@pytest.mark.parametrize("kind, copies", [
    ("cross", 1),
    ("slot", 1),
    ("bixt", 3 + 2 * 2),  # tokens change between layers; of two also what they were told, and what is fed
])  # fmt: skip
def test_autocast_keeps_one_copy_of_the_tokens_for_all_that_read_them(kind, copies):
    model, kept = build(ConceptEncoder, layer_kind=kind, init_queries="orthogonal"), {}

    def record(x):
        if x.shape == (77, 32) and x.dtype == BF16:  # nothing else has so many rows
            kept[x.data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(record, lambda x: x), torch.autocast("cpu", BF16):
        model(packed=texts(40, 37))
    assert len(kept) == copies
