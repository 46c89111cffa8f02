"""Matmul FLOPs of a training step, by part, from the sizes of a view: what model FLOPs utilisation is a share of.

A multiply and an add count as two. Only matrix products count, not norms, softmax, RoPE or embedding look-ups. The
backward pass costs twice the forward: recomputation inside an operator is not useful work and is not counted.

B sequences, T tokens the encoder reads, C concepts, M target rows, d model width, k width of the keys, I feed-forward
width, V vocabulary, S pairs of a target and a concept (C * M) or a token and a concept (C * T).
"""

from dataclasses import dataclass
from typing import Any

from ..models.config import ConceptConfig
from ..models.objectives.view import View

BACKWARD = 2  # times the forward pass


@dataclass(frozen=True)
class Sizes:
    """What the cost of one view depends on."""

    num_sequences: int  # B
    num_tokens: int  # T
    num_targets: int  # M

    @classmethod
    def of(cls, view: View) -> "Sizes":
        return cls(view.encoder.num_sequences, view.encoder.num_tokens, view.num_targets)


COUNTED: dict[str, tuple[Any, ...]] = {  # field -> the values for which forward_flops counts every product
    "layer_kind": ("cross",), "num_token_layers": (0,), "concept_positions": ("rope", "learned", "sinusoidal", "none"),
    "iteration_sampling": ("fixed",), "backprop_iterations": (None,), "loss_every_iteration": (False,),
    "concept_dropout": (0.0,), "nested_concepts": (False,), "decoder_queries": ("token+position", "position"),
    "decoder_mixing": ("none",),
}  # fmt: skip


def uncounted(config: ConceptConfig) -> str | None:
    """The first field whose value adds or removes work that ``forward_flops`` does not know of."""
    if config.token_dim != config.hidden_size:
        return f"token_dim = {config.token_dim}"
    wrong = (name for name, values in COUNTED.items() if getattr(config, name) not in values)
    return next((f"{name} = {getattr(config, name)}" for name in wrong), None)


def forward_flops(config: ConceptConfig, sizes: Sizes) -> dict[str, int]:
    """FLOPs of one forward pass, by part: each is linear in T and in M.

        read     4 T d k  +  4 B C d^2  +  4 C T d                  keys and values; queries and output; attention
        mix      4 B C d (d + k)  +  4 B C^2 d                      the same among concepts
        feed     6 B C d I                                          gate, up, down
        decoder  4 B C d k  +  4 M d^2  +  4 C M d  +  6 M d I      per layer, and its modulation
        head     2 M d V

    Raises:
        ValueError: the configuration has work that is not counted; no utilisation is better than a wrong one.
    """
    if (field := uncounted(config)) is not None:
        raise ValueError(f"flops: not counted for {field}")
    B, T, M, C = sizes.num_sequences, sizes.num_tokens, sizes.num_targets, config.num_concepts
    d, inner, L = config.hidden_size, config.intermediate_size, config.iterations
    k = config.num_key_value_heads * config.head_dim
    decoder = 4 * B * C * d * k + 4 * M * d * d + 4 * C * M * d + 6 * M * d * inner
    modulation = 0
    if config.timestep_conditioning:
        num_branches = 2 * config.num_decoder_layers  # each opens with (gate,) shift and scale; the last norm too
        modulation = 2 * B * d * d * (3 * num_branches + 2) + 2 * B * (256 * d + d * d)
    return {
        "read": L * (4 * T * d * k + 4 * B * C * d * d + 4 * C * T * d),
        "mix": L * (4 * B * C * d * (d + k) + 4 * B * C * C * d),
        "feed": L * 6 * B * C * d * inner,
        "decoder": config.num_decoder_layers * decoder + modulation,
        "head": 2 * M * d * config.vocab_size,
    }


def step_flops(config: ConceptConfig, sizes: Sizes) -> int:
    """FLOPs of forward and backward together."""
    return (1 + BACKWARD) * sum(forward_flops(config, sizes).values())
