"""Matmul FLOPs of a training step, by part, from the sizes of a view: what model FLOPs utilisation is a share of.

A multiply and an add count as two. Only matrix products count, not norms, softmax, RoPE or embedding look-ups. The
backward pass costs twice the forward: recomputation inside an operator is not useful work and is not counted.

B sequences, T tokens the encoder reads, C concepts, M target rows, d model width, k width of the keys, I feed-forward
width, V vocabulary, S pairs of a target and a concept (C * M) or a token and a concept (C * T).
"""

from dataclasses import dataclass

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


def forward_flops(config: ConceptConfig, sizes: Sizes) -> dict[str, int]:
    """FLOPs of one forward pass, by part: each is linear in T and in M.

        read     4 T d k  +  4 B C d^2  +  4 C T d                  keys and values; queries and output; attention
        mix      4 B C d (d + k)  +  4 B C^2 d                      the same among concepts
        feed     6 B C d I                                          gate, up, down
        decoder  4 B C d k  +  4 M d^2  +  4 C M d  +  6 M d I      per layer, and its modulation
        head     2 M d V
    """
    B, T, M, C = sizes.num_sequences, sizes.num_tokens, sizes.num_targets, config.num_concepts
    d, inner, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
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
