"""Floors against figures worked out by hand: 8 heads of 64, bfloat16, 3.0 and 4.3 TB/s, products at 450 TFLOP/s."""

import pytest

from conceptron.bench.measure.roofline import OPERATORS, Ceilings, Floor, work_of

MANY = {"B": 64, "N": 512, "C": 128, "H": 8, "D": 64}
LONG = {"B": 1, "N": 131072, "C": 128, "H": 8, "D": 64}
SLOW, FAST = Ceilings(3000, 450), Ceilings(4300, 450)

TOKENS = [  # tensors of the tokens; MB, us at 3.0 and 4.3 TB/s, us of the products: 64 x 512, then 1 x 128K
    ("concept_attention", "forward", ("k", "v"), (67, 22, 16, 19), (268, 89, 62, 76)),
    ("concept_attention", "backward", ("k", "v", "dk", "dv"), (134, 45, 31, 48), (537, 179, 125, 191)),
    ("token_attention", "forward", ("q", "out"), (67, 22, 16, 19), (268, 89, 62, 76)),
    ("token_attention", "backward", ("q", "dout", "dq"), (101, 34, 23, 48), (403, 134, 94, 191)),
    ("bixt_attention", "forward", ("token_qk", "token_v", "token_out"), (101, 34, 23, 29), (403, 134, 94, 115)),
    ("bixt_attention", "backward", ("token_qk", "token_v", "token_dout", "token_dqk", "token_dv"),
     (168, 56, 39, 67), (671, 224, 156, 267)),
    ("slot_attention", "forward", ("k", "v"), (67, 22, 16, 19), (268, 89, 62, 76)),
    ("slot_attention", "backward", ("k", "v", "dk", "dv"), (134, 45, 31, 48), (537, 179, 125, 191)),
]  # fmt: skip


@pytest.mark.parametrize(("operator", "mode", "names", "many", "long"), TOKENS)
def test_tokens_by_hand(operator, mode, names, many, long):
    for sizes, (megabytes, slow_us, fast_us, matmul_us) in ((MANY, many), (LONG, long)):
        work = work_of(operator, mode, sizes, itemsize=2)
        tokens = sum(work.traffic[name] for name in names)
        assert tokens / 1e6 == pytest.approx(megabytes, abs=0.6)
        assert tokens / 3.0e6 == pytest.approx(slow_us, abs=0.6)
        assert tokens / 4.3e6 == pytest.approx(fast_us, abs=0.6)
        assert work.floor(SLOW).matmul_us == pytest.approx(matmul_us, abs=0.6)


def test_concepts_count_too():
    work = work_of("concept_attention", "forward", MANY, itemsize=2)
    side = 64 * 128 * 8 * 64 * 2  # q, and the same for out
    assert work.bytes == 4 * 64 * 512 * 8 * 64 + 2 * side + 4 * 64 * 128 * 8
    assert work.flops == 4 * 128 * 512 * 64 * 512


def test_grouped_heads_shrink_the_keys_only():
    full, grouped = (work_of("concept_attention", "forward", LONG | {"Hkv": n}, 2) for n in (8, 2))
    assert grouped.traffic["k"] * 4 == full.traffic["k"]
    assert grouped.traffic["q"] == full.traffic["q"] and grouped.flops == full.flops


def test_head_by_hand():
    sizes, ceilings = {"M": 8192, "V": 50368, "d": 512}, Ceilings(4300, 700)
    assert work_of("linear_cross_entropy", "both", sizes, 2).floor(ceilings).us == pytest.approx(1810, rel=2e-3)
    memory = work_of("linear_cross_entropy", "both", sizes, 2, method="memory")
    assert memory.floor(ceilings).us == pytest.approx(2410, rel=3e-3)
    assert memory.floor(ceilings).bound == "matmul"
    streamed = work_of("linear_cross_entropy", "both", sizes, 2).bytes - memory.bytes
    assert streamed == 3 * 8192 * 50368 * 2


def test_adaln_by_hand():
    sizes = {"B": 64, "N": 512, "d": 512}
    elements = 64 * 512 * 512
    for mode, residual, per_element in (
        ("forward", False, 4), ("backward", False, 6), ("forward", True, 8), ("backward", True, 12),
    ):  # fmt: skip
        work = work_of("adaln", mode, sizes, 2, residual=residual)
        rest = 64 * 512 * 2 * 5 + 64 * 512 * 8  # at most five vectors a sequence, and the moments
        assert elements * per_element < work.bytes <= elements * per_element + rest
    forward = work_of("adaln", "forward", sizes, 2).floor(Ceilings(4000, 700))
    assert forward.us == pytest.approx(34, abs=0.6) and forward.bound == "memory" and forward.matmul_us == 0
    assert work_of("adaln", "backward", sizes, 2).floor(Ceilings(4000, 700)).us == pytest.approx(50, abs=0.9)


@pytest.mark.parametrize("operator", OPERATORS)
def test_both_is_one_after_the_other(operator):
    sizes = MANY | {"M": 100, "V": 1000, "d": 64}
    forward, backward, both = (work_of(operator, mode, sizes, 2) for mode in ("forward", "backward", "both"))
    assert both.bytes == forward.bytes + backward.bytes
    assert both.flops == forward.flops + backward.flops


def test_the_larger_side_binds():
    floor = Floor(bytes=1, flops=1, memory_us=20.0, matmul_us=30.0)
    assert (floor.us, floor.bound, floor.share(60.0)) == (30.0, "matmul", 0.5)
    floor = Floor(bytes=1, flops=1, memory_us=40.0, matmul_us=30.0)
    assert (floor.us, floor.bound, floor.share(50.0)) == (40.0, "memory", 0.8)


def test_refused():
    with pytest.raises(ValueError, match="operator: expected one of concept_attention"):
        work_of("softmax", "forward", MANY, 2)
    with pytest.raises(ValueError, match="mode: expected one of"):
        work_of("adaln", "fwd", MANY, 2)
    with pytest.raises(ValueError, match="method: expected"):
        work_of("linear_cross_entropy", "forward", {"M": 1, "V": 1, "d": 1}, 2, method="fast")
    with pytest.raises(ValueError, match="ceilings: expected positive"):
        work_of("concept_attention", "forward", MANY, 2).floor(Ceilings(0, 450))
    with pytest.raises(ValueError, match="measured_us: expected a positive time"):
        Floor(1, 1, 1.0, 1.0).share(0.0)
