"""The project's decision gates as one table, and what measured values say to each.

The gates come from planning documents of different ages and do not all agree. Every one is kept, with its source, so
that a verdict can be compared with what was planned; ``contradictions`` says which cannot both be meant. Counts of
concepts were written for C = 128 and are scaled to the C at hand.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from .metrics import equicosine_rank

WRITTEN_FOR = 128  # concepts of the models that the documents speak about

REFRAME = "plan v2"
TODO = "task list v3"
DIFFUSION = "diffusion L2 report"
ROADMAP = "roadmap gate"
FRAMEWORK = "analysis framework"
HOUSE = "Conceptron"


class Gate(NamedTuple):
    """``key`` of the measured values must be above (">") or below ("<") ``threshold``; else ``remedy`` is next."""

    source: str
    key: str
    sense: str
    threshold: float
    remedy: str
    per_concept: bool = False  # threshold is a number of concepts out of 128
    void: str = ""  # why values below void_below say nothing about the model
    void_below: float = math.inf


class Verdict(NamedTuple):
    gate: Gate
    threshold: float  # scaled to the C at hand
    value: float | None
    verdict: str  # PASS, FAIL, VOID or "not measured"
    reason: str


ISOTROPY_VOID = "0 by construction: a LayerNorm's output sums to zero, so the covariance is singular"
SCALE_VOID = "a raw singular value grows with the width and the number of concepts; use the dominance S1 / sum S"

COUNT = True  # the threshold is a number of concepts out of 128
REGULARISE = "concepts have collapsed: regularise, or a contrastive objective, before more data"
COMPETE = "let concepts compete for tokens (slot attention), or generate other text than was read"
REDUNDANT = "concepts repeat each other: orthogonality loss, identity-preserving initialisation"
DUPLICATES = "some concepts are copies of each other: competition between concepts"
NARROW = "the variance lies in few dimensions"
UNUSED = "dimensions without variance"

GATES = (
    # before anything is read into a rank
    Gate(HOUSE, "static_fraction", "<", 0.8, "diverse but empty: anchor the queries in the text"),
    Gate(HOUSE, "rank_dynamic", ">", 32, "the content spans few directions; " + COMPETE, COUNT),
    Gate(HOUSE, "dead_slots", "<", 1, "concepts that no text moves: use fewer, or concept dropout"),
    Gate(HOUSE, "duplicate_pairs", "<", 1, DUPLICATES),
    # effective rank of the mean concepts
    Gate(f"{REFRAME}, phase 2", "effective_rank", ">", 100, REGULARISE, COUNT),
    Gate(f"{REFRAME}, gate after phase 2", "effective_rank", ">", 50, REGULARISE, COUNT),
    Gate(f"{REFRAME}, targets", "effective_rank", ">", 40, REGULARISE, COUNT),
    Gate(f"{REFRAME}, targets", "effective_rank_normalized", ">", 0.3, "red flag: " + REGULARISE),
    Gate(f"{REFRAME}, slot attention", "effective_rank", ">", 64, "slot attention does not become the default", COUNT),
    Gate(f"{TODO}, TODO 7", "effective_rank", ">", 60, "more data alone does not help", COUNT),
    Gate(f"{TODO}, TODO 10", "effective_rank", ">", 64, "the deletion objective alone does not help", COUNT),
    Gate(f"{TODO}, TODO 11", "effective_rank", ">", 20, "depth does not help; " + COMPETE, COUNT),
    Gate(f"{TODO}, TODO 11b", "effective_rank", ">", 30, COMPETE, COUNT),
    Gate(f"{ROADMAP} 1", "effective_rank", ">", 64, "above 30 of 128: slot attention; below: rethink", COUNT),
    # spread of the concepts
    Gate(f"{REFRAME}, targets", "similarity_mean", "<", 0.3, REDUNDANT),
    Gate(f"{REFRAME}, gate after phase 2", "similarity_mean", "<", 0.5, REDUNDANT),
    Gate(f"{REFRAME}, targets", "similarity_max", "<", 0.6, DUPLICATES),
    Gate(FRAMEWORK, "similarity_max", "<", 0.5, DUPLICATES),
    Gate(f"{REFRAME}, targets", "uniformity", "<", 0.3, REDUNDANT),
    Gate(FRAMEWORK, "uniformity", "<", 0.1, REDUNDANT),
    Gate(f"{REFRAME}, targets", "dims_95", ">", 50, NARROW, COUNT),
    Gate(f"{REFRAME}, targets", "participation_ratio_normalized", ">", 0.1, NARROW),
    Gate(f"{REFRAME}, phase 2", "participation_ratio_normalized", ">", 0.3, NARROW + ": spanning-tree regulariser"),
    Gate(f"{REFRAME}, phase 2", "twonn_pooled", ">", 20, "intrinsic dimension collapsed: change the architecture"),
    Gate(f"{REFRAME}, targets", "collapsed_dimensions", "<", 1, UNUSED),
    Gate(FRAMEWORK, "collapsed_dimensions_share", "<", 0.1, "red flag: " + UNUSED),
    Gate(f"{REFRAME}, targets", "dimension_std_mean", ">", 0.3, NARROW),
    Gate(DIFFUSION, "dimension_std_min", ">", 0.01, NARROW),
    Gate(DIFFUSION, "dominance", "<", 0.3, "one direction dominates"),
    Gate(f"{TODO}, TODO 4", "top_singular_value", "<", 50, "one direction dominates", void=SCALE_VOID),
    Gate(DIFFUSION, "isotropy", ">", 0.001, "anisotropic", void=ISOTROPY_VOID, void_below=1e-6),
    Gate(FRAMEWORK, "isotropy", ">", 0.01, "anisotropic", void=ISOTROPY_VOID, void_below=1e-6),
    # losses and downstream scores, judged when the caller has measured them
    Gate(f"{REFRAME}, after scaling", "mlm_loss", "<", 2.0, "above 2.5: check the data and the learning rate"),
    Gate(f"{TODO}, TODO 11b", "mlm_loss", "<", 3.0, "above 3.5: halve the weight of the concept losses"),
    Gate(f"{ROADMAP} 1", "suffix_loss", "<", 3.0, "out of reach for a decoder that does not mix tokens"),
    Gate(f"{TODO}, after fixed weights", "stsb_pearson", ">", 0.60, "concept losses alone are not enough"),
    Gate(f"{TODO}, TODO 11", "stsb_pearson", ">", 0.50, "below 0.30: generate other text than was read"),
    Gate(f"{ROADMAP} 1", "stsb_pearson", ">", 0.70, "add a contrastive objective"),
    Gate(f"{ROADMAP} 2", "stsb_pearson", ">", 0.75, "more data and depth"),
    Gate(f"{ROADMAP} 5", "stsb_zero_shot", ">", 0.60, "a contrastive objective"),
    Gate(f"{TODO}, after fixed weights", "qqp_f1", ">", 0.70, "concept losses alone are not enough"),
    Gate(f"{ROADMAP} 2", "mnli_matched_accuracy", ">", 0.65, "below 0.60: initialise from a backbone"),
    Gate("decoder head report", "mrpc_f1", ">", 0.83, "near the majority level of 0.81 this score says nothing"),
)  # fmt: skip


def judge(values: Mapping[str, float], num_concepts: int, gates: Iterable[Gate] = GATES) -> list[Verdict]:
    """A verdict per gate. ``values``: what was measured (``metrics.geometry``, scores); absent or NaN: not measured."""
    return [judge_one(gate, values.get(gate.key), num_concepts) for gate in gates]


def judge_one(gate: Gate, value: float | None, num_concepts: int) -> Verdict:
    threshold = gate.threshold * num_concepts / WRITTEN_FOR if gate.per_concept else gate.threshold
    if value is None or math.isnan(value):
        return Verdict(gate, threshold, None, "not measured", "")
    if gate.void and value < gate.void_below:
        return Verdict(gate, threshold, float(value), "VOID", gate.void)
    passed = value > threshold if gate.sense == ">" else value < threshold
    return Verdict(gate, threshold, float(value), "PASS" if passed else "FAIL", "" if passed else gate.remedy)


def contradictions(num_concepts: int) -> list[str]:
    """Pairs of gates that cannot both be meant, with the figure that shows it for C concepts."""
    allowed = equicosine_rank(0.3, num_concepts)
    wanted = num_concepts / 2
    needed = cosine_for_rank(wanted, num_concepts)
    return [
        f"A mean similarity below 0.3 ({REFRAME}) and an effective rank above C/2 = {wanted:g} ({ROADMAP} 1): "
        f"{num_concepts} prototypes of one common cosine 0.3 have rank {allowed:.1f}; rank {wanted:g} needs a cosine "
        f"below {needed:.4f}.",
        "An effective rank of the mean concepts says nothing about content: frozen orthogonal prototypes reach C. Read "
        "it with the static fraction and the rank of the input-dependent part.",
    ]


def cosine_for_rank(rank: float, num_concepts: int) -> float:
    """The cosine at which ``equicosine_rank`` is ``rank``: (1 - q) / (1 - q + q C), q = ((rank - 1) / (C - 1))^2."""
    q = ((rank - 1) / (num_concepts - 1)) ** 2
    return (1 - q) / (1 - q + q * num_concepts)
