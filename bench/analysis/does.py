"""What concepts do: how much worse the model answers without some of them, with those of another text, with fewer.

Every figure is the mean NLL, in nats, of the same held-out targets from one view of the objective's grid: of those that
the encoder did not see, where there are such. B texts, C concepts, d model width, M targets.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...engine.data.loader import Loader
from ...engine.data.windows import Part, Windows, cut
from ...engine.errors import InputError
from ...models.encoder import ConceptEncoderOutput
from ...models.exposure import nested_order
from ...models.masked_lm import ConceptForMaskedLM
from ...models.objectives import View
from .subject import reader

BUDGET, FEWEST, MOST = 2**16, 1024, 4096  # targets times concepts, which is what dropping each once costs; targets
RATIO_TARGETS = 1024  # at each ratio
BATCH_TOKENS = 2048
RATIOS = (0.5, 1, 2, 4, 8, 16, 32, 64)  # tokens a concept
SURE = 2.0  # standard errors
LEAST_GAIN = 0.01  # nats that concepts must be worth before a share of it is asked for

Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # concepts [B, C, d], anchors [B, C] -> the same, changed


class Reading(NamedTuple):
    """One batch of texts, encoded once; what is asked about them again and again."""

    view: View
    concepts: Tensor  # [B, C, d]
    anchors: Tensor  # [B, C]
    asked: Tensor  # [M] bool: targets that count
    text: Tensor  # [M] int64, the text of each target, numbered through all batches
    place: Tensor  # [M] float32, where in its text each target stands, as a share


class Slot(NamedTuple):
    increase: float  # of the NLL without this concept
    error: float  # its standard error over texts


class Does(NamedTuple):
    view: str  # which of the grid
    num_targets: int
    num_texts: int
    nll: dict[str, float]  # of the text's own concepts; other: of another text; mean: of all texts; zero
    half_swapped: dict[str, float]  # increase beside the swapped first half of the concepts, and beside the others
    slots: list[Slot]
    kept: list[dict[str, float | None]]  # NLL by number of concepts kept: best first and best dropped, by order
    ratios: list[dict[str, float | None]]  # NLL by tokens a concept, of shorter texts and of fewer concepts
    is_nested: bool  # trained so that any first k concepts serve

    @property
    def figures(self) -> dict[str, float | None]:
        """Names as in the gates."""
        gain = self.nll["zero"] - self.nll["own"]
        return {
            "used_slots": sum(slot.increase > SURE * slot.error for slot in self.slots),
            "functional_rank": functional_rank([slot.increase for slot in self.slots]),
            "concepts_for_95": enough(self.kept, self.nll["own"], gain),
            "nll_without_concepts": self.nll["zero"],
            "nll_of_mean_concepts": self.nll["mean"],
        }


def functional_rank(increases: Sequence[float]) -> float:
    """exp of the entropy of the increases' shares: how many concepts carry what is lost, 1 .. C; 0 if nothing is."""
    shares = np.clip(np.array(increases, dtype=np.float64), 0, None)
    if shares.sum() <= 0:
        return 0.0
    shares = shares[shares > 0] / shares.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def enough(kept: Sequence[dict[str, float | None]], own: float, gain: float) -> int | None:
    """The least k, of those measured, at which the first k concepts give 95 % of what all of them do; None where they
    give next to nothing."""
    if gain < LEAST_GAIN:
        return None
    return next((int(row["kept"]) for row in kept if row["nested"] <= own + 0.05 * gain), None)


def does(model: ConceptForMaskedLM, loader: Loader, usage: Sequence[float] | None) -> Does:
    """``usage``: each concept's share of the tokens (``reads.Slot.usage``), which orders them; None: not known."""
    model.eval()
    C = model.config.num_concepts
    name, readings = read(model, loader, min(MOST, max(FEWEST, BUDGET // C)))
    own = ask(model, readings)
    prototypes = torch.cat([reading.concepts for reading in readings]).mean(0)
    nll = {
        "own": mean(own),
        "other": mean(ask(model, readings, lambda z, a: (z.roll(1, 0), a.roll(1, 0)))),
        "mean": mean(ask(model, readings, lambda z, a: (prototypes.expand_as(z), a))),
        "zero": mean(ask(model, readings, lambda z, a: (torch.zeros_like(z), a))),
    }
    return Does(
        view=name, num_targets=len(torch.cat(own)), num_texts=sum(len(reading.concepts) for reading in readings),
        nll=nll, half_swapped=swap_half(model, readings, own), slots=drop_each(model, readings, own),
        kept=keep_some(model, readings, usage, nll["zero"]), ratios=compress(model, loader),
        is_nested=model.config.nested_concepts,
    )  # fmt: skip


# --- asking -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def read(
    model: ConceptForMaskedLM, loader: Loader, max_targets: int, num_concepts: int | None = None,
    num_iterations: int | None = None,
) -> tuple[str, list[Reading]]:  # fmt: skip
    """(name of the view, batches with at most about ``max_targets`` targets in whole texts, encoded).

    Raises:
        InputError: no batch has two texts with targets.
    """
    device = next(model.parameters()).device
    name, readings, num_targets, num_texts = "", [], 0, 0
    budget = max(BATCH_TOKENS, 2 * int(loader.windows.lengths.max()))  # two texts at least
    small = Loader(
        loader.windows, loader.objective, loader.tokens, seed=0, tokens_per_step=budget, micro_tokens=budget
    )
    for views in small.evaluation(loader.windows.num_tokens):
        name = name or list(views)[len(views) // 2]
        view = views[name].to(device)
        B = view.encoder.num_sequences
        if B < 2 or view.num_targets == 0:
            continue
        encoded = model.encoder(
            packed=view.encoder, return_dict=True, num_concepts=num_concepts, num_iterations=num_iterations
        )
        rows_M = torch.arange(len(view.decoder_position_ids), device=device)
        rows_M = rows_M if view.target_rows is None else view.target_rows
        text_M = torch.searchsorted(view.decoder_cu_seqlens[1:].contiguous(), rows_M.to(torch.int32), right=True)
        length_M = view.encoder.num_positions().clamp_min(1)[text_M]
        place_M = (view.decoder_position_ids[rows_M].float() + 0.5) / length_M
        asked_M = ~view.seen if bool((~view.seen).any()) else torch.ones_like(view.seen)
        readings.append(Reading(
            view, encoded.last_hidden_state, encoded.anchors, asked_M, text_M + num_texts, place_M
        ))  # fmt: skip
        num_targets, num_texts = num_targets + int(asked_M.sum()), num_texts + B
        if num_targets >= max_targets:
            break
    if not readings:
        raise InputError("the held-out text: expected two windows or more that can be read together; give more text")
    return name, readings


@torch.no_grad()
def ask(model: ConceptForMaskedLM, readings: Sequence[Reading], change: Change | None = None) -> list[Tensor]:
    """The NLL of every target that counts, [M] of each batch, with the concepts as ``change`` leaves them."""
    found = []
    for reading in readings:
        z, a = (reading.concepts, reading.anchors) if change is None else change(reading.concepts, reading.anchors)
        encoded = ConceptEncoderOutput(last_hidden_state=z, anchors=a)
        nll_M = model(view=reading.view, encoded=encoded, return_nll=True, return_dict=True).nll
        found.append(nll_M[reading.asked].double().cpu())
    return found


def mean(nll: Sequence[Tensor]) -> float:
    return float(torch.cat(list(nll)).mean())


def keep(order_BK: Tensor) -> Change:
    """Only these concepts of each text, [B, K] or, the same of all, [K]; in the order in which they stand."""

    def change(z: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        index = order_BK.expand(len(z), -1).sort(1).values.to(z.device)
        return z.gather(1, index[..., None].expand(-1, -1, z.shape[2])), a.gather(1, index)

    return change


# --- what is lost -----------------------------------------------------------------------------------------------------


def drop_each(model: ConceptForMaskedLM, readings: Sequence[Reading], own: Sequence[Tensor]) -> list[Slot]:
    """Without one concept after the other; errors over texts, whose targets belong together."""
    C = readings[0].concepts.shape[1]
    if C == 1:  # then nothing is left
        changes: list[Change] = [lambda z, a: (torch.zeros_like(z), a)]
    else:
        everyone = torch.arange(C)
        changes = [keep(everyone[everyone != c]) for c in range(C)]
    text_M = torch.cat([reading.text[reading.asked].cpu() for reading in readings])
    before = torch.cat(list(own))
    return [Slot(*of_texts(torch.cat(ask(model, readings, change)) - before, text_M)) for change in changes]


def of_texts(values_M: Tensor, text_M: Tensor) -> tuple[float, float]:
    """(mean over targets, its standard error where the targets of one text are not independent)."""
    sums = torch.zeros(int(text_M.max()) + 1, dtype=torch.float64).index_add_(0, text_M, values_M.double())
    counts = torch.bincount(text_M, minlength=len(sums)).double()
    average, n = values_M.double().mean(), int((counts > 0).sum())
    if n < 2:
        return float(average), math.inf
    rest = (sums - average * counts).square().sum()  # of a ratio of sums (Cochran 1977, section 2.11)
    return float(average), float((rest * n / (n - 1)).sqrt() / counts.sum())


def swap_half(model: ConceptForMaskedLM, readings: Sequence[Reading], own: Sequence[Tensor]) -> dict[str, float]:
    """The first half of the concepts comes from another text: what that costs beside them, and in the other half."""

    def change(z: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        half = z.shape[1] // 2
        return torch.cat((z.roll(1, 0)[:, :half], z[:, half:]), dim=1), a

    increase = torch.cat(ask(model, readings, change)) - torch.cat(list(own))
    place = torch.cat([reading.place[reading.asked].cpu() for reading in readings])
    halves = {"near": place < 0.5, "far": place >= 0.5}
    return {name: float(increase[rows].mean()) if bool(rows.any()) else math.nan for name, rows in halves.items()}


def keep_some(
    model: ConceptForMaskedLM, readings: Sequence[Reading], usage: Sequence[float] | None, nll_of_none: float
) -> list[dict[str, float | None]]:
    """NLL against the number of concepts kept, in four orders: nested (evenly over the text), by the norm of a concept,
    by how many tokens it reads most (``usage``), and by |gradient * concept| of the loss, each text by its own.

    ``NAME`` keeps the first k, ``NAME dropped`` all but the first C - k.
    """
    C = readings[0].concepts.shape[1]
    orders: dict[str, list[Tensor]] = {
        "nested": [nested_order(C).expand(len(r.concepts), C) for r in readings],
        "norm": [r.concepts.norm(dim=-1).argsort(1, descending=True).cpu() for r in readings],
        "gradient": [saliency(model, r).argsort(1, descending=True).cpu() for r in readings],
    }
    if usage is not None and len(usage) == C:
        by_usage = torch.tensor(usage).argsort(descending=True)
        orders["attention"] = [by_usage.expand(len(r.concepts), C) for r in readings]
    rows: list[dict[str, float | None]] = [{"kept": 0, **dict.fromkeys(orders, nll_of_none)}]
    for k in sorted({*(2**i for i in range(C.bit_length()) if 2**i <= C), C}):
        row: dict[str, float | None] = {"kept": k}
        for name, order in orders.items():
            row[name] = mean([ask(model, [r], keep(o[:, :k]))[0] for r, o in zip(readings, order, strict=True)])
            if name != "nested":
                dropped = [ask(model, [r], keep(o[:, C - k :]))[0] for r, o in zip(readings, order, strict=True)]
                row[f"{name} dropped"] = mean(dropped)
        rows.append(row)
    return rows


def saliency(model: ConceptForMaskedLM, reading: Reading) -> Tensor:
    """[B, C] |sum over d of gradient times concept|: the first-order change of the loss without it."""
    z = reading.concepts.detach().clone().requires_grad_(True)
    encoded = ConceptEncoderOutput(last_hidden_state=z, anchors=reading.anchors)
    nll_M = model(view=reading.view, encoded=encoded, return_nll=True, return_dict=True).nll
    (gradient,) = torch.autograd.grad(nll_M[reading.asked].sum(), z)
    return (gradient * z.detach()).sum(-1).abs()


# --- how much a concept can hold --------------------------------------------------------------------------------------


def compress(model: ConceptForMaskedLM, loader: Loader) -> list[dict[str, float | None]]:
    """NLL by tokens a concept: of the same text cut into shorter pieces (``shorter``), and of whole windows read with
    fewer or more concepts than the model was trained for (``concepts``); and of another text's concepts.
    """
    C = model.config.num_concepts
    longest = int(np.median(loader.windows.lengths[loader.evaluation_rows(4 * RATIO_TARGETS)]))
    rows = []
    for ratio in RATIOS:
        row: dict[str, float | None] = {"tokens_per_concept": ratio, **dict.fromkeys(
            ("shorter", "shorter_other", "concepts", "concepts_other")
        )}  # fmt: skip
        length, count = round(ratio * C), max(1, round(longest / ratio))
        if 4 <= length <= longest:
            pieces = reader(in_pieces(loader, length), loader.objective, loader.tokens)
            row["shorter"], row["shorter_other"] = own_and_other(model, pieces, None)
        if longest / ratio >= 1 and count <= 4 * C and has_any_number(model):
            row["concepts"], row["concepts_other"] = own_and_other(model, loader, count)
        if row["shorter"] is not None or row["concepts"] is not None:
            rows.append(row)
    return rows


def has_any_number(model: ConceptForMaskedLM) -> bool:
    """Whether the encoder can be asked for another number of concepts: a single learned row cannot be stretched."""
    return model.config.num_concepts > 1


def own_and_other(model: ConceptForMaskedLM, loader: Loader, num_concepts: int | None) -> tuple[float, float]:
    _, readings = read(model, loader, RATIO_TARGETS, num_concepts)
    return mean(ask(model, readings)), mean(ask(model, readings, lambda z, a: (z.roll(1, 0), a.roll(1, 0))))


def in_pieces(loader: Loader, length: int) -> Windows:
    """The first held-out windows, each cut into pieces of ``length`` tokens."""
    texts = [loader.windows[int(row)] for row in loader.evaluation_rows(8 * RATIO_TARGETS)]
    offsets = np.cumsum([0, *map(len, texts)])
    starts, lengths = cut(offsets, np.arange(len(texts)), length)
    whole = lengths == length
    return Windows([Part(np.concatenate(texts), starts[whole], lengths[whole])])
