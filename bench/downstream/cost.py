"""What reading one document costs, beside full attention over the same number of tokens at the same width and depth.

Each case is a fresh process; seconds are CPU seconds of that process on a CPU, and memory what its peak is above what
it held before.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from ...engine.model_folder import find, finished
from ...engine.saved_model import load_model
from ...models.packing import pack
from ..measure.peers import Shape, bert
from ..measure.resident import resident_peak

LONGEST = 8192  # tokens that full attention is asked to read
MIB = 2**20


def of_document(place: str, num_tokens: int) -> dict[str, Any]:
    """``num_tokens``: of the document; above LONGEST both read so many."""
    num_tokens = max(1, min(num_tokens, LONGEST))
    row: dict[str, Any] = {"tokens": num_tokens}
    for name, target in (("", "concepts"), (", full attention", "full_attention")):
        memory, seconds = resident_peak(f"conceptron.bench.downstream.cost:{target}", place=place, tokens=num_tokens)
        row |= {f"seconds{name}": round(seconds, 3), f"MiB{name}": round(memory.extra_bytes / MIB, 1)}
    return row


def concepts(place: str, tokens: int) -> Callable[[], float]:
    model = load_model(find(finished(place, f"--model {place}"), "--model"))
    encoder = getattr(model, "encoder", model)
    batch = pack([random_ids(tokens, encoder.config.vocab_size)]).to(next(encoder.parameters()).device)
    return timed(lambda: encoder(packed=batch))


def full_attention(place: str, tokens: int) -> Callable[[], float]:
    """As wide and deep as the backbone, or as the encoder itself where it has none."""
    model = load_model(find(finished(place, f"--model {place}"), "--model"))
    encoder = getattr(model, "encoder", model)
    config = encoder.config if encoder.backbone is None else encoder.backbone.model.config
    device = next(encoder.parameters()).device
    shape = Shape(config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size,
                  encoder.config.vocab_size, tokens)  # fmt: skip
    del model, encoder
    peer, ids = bert(shape).to(device).eval(), random_ids(tokens, shape.vocab_size)[None].to(device)
    return timed(lambda: peer(ids))


def random_ids(num_tokens: int, vocab_size: int) -> torch.Tensor:
    return torch.randint(1, vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(0))


def timed(read: Callable[[], object]) -> Callable[[], float]:
    @torch.inference_mode()
    def call() -> float:
        begin = time.perf_counter() if torch.cuda.is_available() else time.process_time()
        read()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            return time.perf_counter() - begin
        return time.process_time() - begin

    return call
