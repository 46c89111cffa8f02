"""Which sizes are compared on which machine."""

from .cases import OPERATORS, Case

HEADS = {"H": 8, "D": 64}


def cpu_cases() -> list[Case]:
    """Small enough that every operator and provider takes a few minutes on two cores."""
    text = {"B": 2, "N": 2048, "C": 128, "H": 4, "D": 64}
    return [
        Case("concept_attention", text), Case("concept_attention", text, ragged=True),
        Case("token_attention", text), Case("bixt_attention", text), Case("slot_attention", text),
        Case("linear_cross_entropy", {"M": 512, "V": 16384, "d": 256}),
        Case("linear_cross_entropy", {"M": 512, "V": 16384, "d": 256, "smoothing": 10}),
        Case("adaln", {"B": 8, "N": 512, "d": 512}, ragged=True),
    ]  # fmt: skip


def anchor_cases() -> list[Case]:
    """The seeds' shapes and long texts, for one GPU: what the targets are stated for. The operators take turns, so that
    a time limit leaves each with its first cases."""
    cases = []
    for operator in ("concept_attention", "token_attention"):
        for B, N in ((64, 512), (8, 8192), (1, 8192), (1, 32768), (1, 131072)):
            cases.append(Case(operator, {"B": B, "N": N, "C": 128, **HEADS}))
        cases.append(Case(operator, {"B": 64, "N": 512, "C": 128, **HEADS}, ragged=True))
    for operator in ("bixt_attention", "slot_attention"):
        cases += [Case(operator, {"B": B, "N": N, "C": 128, **HEADS}) for B, N in ((64, 512), (1, 32768))]
    cases += [Case("linear_cross_entropy", {"M": 8192, "V": 50368, "d": 512, "smoothing": s}) for s in (0, 10)]
    cases += [Case("adaln", {"B": 64, "N": 512, "d": 512}, ragged) for ragged in (False, True)]
    turn = {id(case): sum(c.operator == case.operator for c in cases[:i]) for i, case in enumerate(cases)}
    return sorted(cases, key=lambda case: turn[id(case)])


def wide_cases() -> list[Case]:
    """The anchor cases, and other numbers of concepts, widths and rows."""
    cases = anchor_cases()
    for operator in ("concept_attention", "token_attention"):
        for C in (32, 64, 256, 512):
            cases += [Case(operator, {"B": B, "N": N, "C": C, **HEADS}) for B, N in ((64, 512), (1, 131072))]
    for M, d in ((1024, 512), (4096, 512), (16384, 512), (8192, 768), (8192, 1024)):
        cases.append(Case("linear_cross_entropy", {"M": M, "V": 50368, "d": d, "smoothing": 10}))
    cases.append(Case("linear_cross_entropy", {"M": 8192, "V": 151936, "d": 512}))
    cases += [Case("adaln", {"B": 64, "N": 512, "d": d}) for d in (768, 1024)]
    return sorted(cases, key=lambda case: OPERATORS.index(case.operator))


def small_cases() -> list[Case]:
    """One quick case for each operator: what the tests run."""
    text = {"B": 2, "N": 256, "C": 32, "H": 2, "D": 32}
    attention = [Case(operator, text, ragged=True) for operator in OPERATORS if operator.endswith("attention")]
    head = Case("linear_cross_entropy", {"M": 64, "V": 1024, "d": 64, "smoothing": 10})
    return [*attention, head, Case("adaln", {"B": 2, "N": 128, "d": 64}, ragged=True)]


MATRICES = {"small": small_cases, "cpu": cpu_cases, "anchor": anchor_cases, "wide": wide_cases}
