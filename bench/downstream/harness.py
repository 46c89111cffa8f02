"""A model of this package as a language model of EleutherAI's lm-evaluation-harness.

    import lm_eval
    from conceptron.bench.downstream.harness import ConceptLM
    lm_eval.simple_evaluate(model=ConceptLM("runs/prefix/model"), tasks=["scrolls_quality"], limit=50)

What comes before a continuation is read by the encoder; the decoder says how likely each token of the continuation is
at its place, all of them hidden at once. That is no chain of conditional probabilities, as an autoregressive model has
it, and its sums are comparable between options, not between models. Texts are written by denoising.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from torch import Tensor

from ...engine.errors import InputError
from ...engine.model_folder import find
from ...engine.saved_model import load_model, load_vocabulary
from ...models.generation.canvas import continue_canvas, fill, given_text
from ...models.generation.sampling import Sampling
from ...models.masked_lm import ConceptForMaskedLM
from ...models.packing import pack

NEW_TOKENS = 64  # where a task does not say how many
AT_ONCE = 16  # requests


class ConceptLM(LM):
    """
    Args:
        place: a folder of a masked language model, or its hub id.
        steps: denoising steps of a text that is written.

    Raises:
        InputError: there is no such model.
    """

    def __init__(self, place: str | Path, steps: int = 16) -> None:
        super().__init__()
        folder = find(str(place), "model")
        model = load_model(folder)
        if not isinstance(model, ConceptForMaskedLM):
            raise InputError(f"{folder}: a {type(model).__name__} has no decoder; give a masked language model")
        self.model, self.vocabulary, self.steps = model, load_vocabulary(folder, model.config), steps

    @torch.inference_mode()
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(sum over tokens of the log probability in nats, whether each is the most likely one)"""
        found: list[tuple[float, bool]] = []
        for start in range(0, len(requests), AT_ONCE):
            pairs = [request.args for request in requests[start : start + AT_ONCE]]
            contexts = self.vocabulary.encode([context for context, _ in pairs])
            wanted = self.vocabulary.encode([continuation for _, continuation in pairs])
            logits = self.predicted(contexts, [len(ids) for ids in wanted]).log_softmax(-1)
            targets = torch.tensor([i for ids in wanted for i in ids], device=logits.device, dtype=torch.int64)
            scores, is_best = logits.gather(1, targets[:, None])[:, 0], logits.argmax(-1) == targets
            sizes = [len(ids) for ids in wanted]
            found += [(float(a.sum()), bool(b.all())) for a, b in zip(scores.split(sizes), is_best.split(sizes),
                                                                     strict=True)]  # fmt: skip
        return found

    def predicted(self, contexts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Tensor:
        """[M, V] float32 logits of ``lengths`` tokens behind each context; the same context is read once."""
        model, mask = self.model, self.vocabulary.tokens.mask_id
        unique = list(dict.fromkeys(map(tuple, contexts)))
        read = model.encoder(packed=model.encoder.bare(pack(unique).to(model.device)))
        owners = torch.tensor([unique.index(tuple(context)) for context in contexts], device=model.device)
        for name in ("last_hidden_state", "anchors"):
            read[name] = read[name][owners]
        canvas = pack([[*context, *[mask] * length] for context, length in zip(contexts, lengths, strict=True)])
        is_asked = torch.cat([torch.arange(len(context) + length) >= len(context)
                              for context, length in zip(contexts, lengths, strict=True)])  # fmt: skip
        rows = canvas.select(is_asked).to(model.device)
        hidden = model.decode(
            read, rows.position_ids, rows.cu_seqlens, rows.max_seqlen, rows.input_ids,
            torch.ones(rows.num_sequences, device=model.device),
        )  # fmt: skip
        return model.lm_head(hidden).float()

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Of whole texts, behind nothing: what the decoder says without having read anything."""
        behind_nothing = [Instance("loglikelihood", {}, ("", request.args[0]), 0) for request in requests]
        return [score for score, _ in self.loglikelihood(behind_nothing)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Texts up to the first of the strings that end them."""
        written = []
        for request in requests:
            context, options = request.args
            tokens = self.vocabulary.tokens
            until, length = stops(options), int(options.get("max_gen_toks", NEW_TOKENS))
            (ids,) = self.vocabulary.encode([context])
            canvas = continue_canvas([ids], length, tokens)
            sampling = Sampling(steps=min(self.steps, length))
            filled = fill(self.model, canvas, tokens, sampling, given_text(canvas, tokens))
            text = self.vocabulary.tokenizer.decode(filled.input_ids[len(ids) :].tolist())
            for each in until:
                text = text.partition(each)[0]
            written.append(text)
        return written


def stops(options: dict[str, Any]) -> list[str]:
    until = options.get("until") or []
    return [until] if isinstance(until, str) else [each for each in until if each]
