"""The parts of a model: what parameters, FLOPs and norms of gradients are told apart by."""

import re

PARTS = {  # part -> weights of ConceptForMaskedLM, the first that fits
    "backbone": r"encoder\.backbone",
    "embedding": r"encoder\.(embed_tokens|positions|widen_tokens|token_norm|token_reader)",
    "tokens": r"encoder\.(token_start|token_layers|layers\.\d+\.token_)",
    "concepts": r"encoder\.(concepts|out_norm)|exposure",
    "read": r"encoder\.layers\.\d+\.(read|update)",
    "mix": r"encoder\.layers\.\d+\.mix",
    "feed": r"encoder\.layers\.\d+\.feed",
    "decoder": r"decoder",
    "head": r"lm_head",
}


def part_of(name: str) -> str | None:
    """The part of a weight, or of a module that is wholly inside one."""
    return next((part for part, pattern in PARTS.items() if re.match(rf"{pattern}", name)), None)
