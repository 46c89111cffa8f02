"""What a recipe's model costs, before anything is trained: parameters, FLOPs and activations, by part and against N.

    conceptron describe RECIPE [section.field=value ...] [--vocabulary V] [--out DIR]

FLOPs and parameters are closed forms (``flops.py``, ``parameters.py``). Activations are what the forward pass keeps for
the backward pass: it is run on tensors that have sizes but no content, with the fused operators, and what autograd
saves is counted, so that it is what a GPU would hold. FLOPs and activations are per token of text, in the recipe's own
precision, over one micro-batch of windows of full length; the last table is of the encoder alone, on one text, by what
is kept of a token (``ConceptEncoder.keep``): its state, its keys and values in every layer, its id. While a backward
pass runs, states have a gradient as large as they are. Of a backbone, states are counted, which is all that is kept of
a frozen one; not what its own layers keep where they are trained.

B sequences, N tokens of one sequence, C concepts, d model width.
"""

import argparse
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..engine.backbone import describe_backbone
from ..engine.data import pydocs, tokenizer
from ..engine.data.loader import reads
from ..engine.errors import InputError
from ..engine.recipe.load import load_recipe
from ..engine.recipe.schema import Recipe
from ..models.backbone_config import inner_config
from ..models.config import ConceptConfig
from ..models.encoder import ConceptEncoder
from ..models.flops import Sizes, encoder_flops, forward_flops, full_attention_flops, training_flops
from ..models.masked_lm import ConceptForMaskedLM
from ..models.objectives import Lesson, Mixed
from ..models.objectives.view import OPENS_WORD, SampleKey, SpecialTokens, View
from ..models.packing import Packed, pack
from ..models.parts import PARTS
from .measure.environment import environment
from .measure.parameters import parameters
from .measure.peers import Shape, bert
from .measure.results import write_results
from .memory import saved_by_part

SHORTEST = 512  # of the second table
FUSED = {"CONCEPTRON_BACKEND": "triton", "TRITON_INTERPRET": "1"}  # no kernel runs: the tensors have no content


# --- counting without content -----------------------------------------------------------------------------------------


@contextmanager
def without_content(precision: str) -> Iterator[Callable[[Any], Any]]:
    """Inside, tensors have sizes only, operators are the fused ones, and autocast is as in training.

    Yields a function that takes the content from a view or a packed batch.
    """
    with FakeTensorMode() as mode, patch.dict(os.environ, FUSED), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about what a CPU would be slow at

        def strip(value: Any) -> Any:
            if isinstance(value, Tensor):
                return mode.from_tensor(value)
            if isinstance(value, Packed):
                return Packed(*map(strip, value))
            if isinstance(value, View):
                return replace(value, **{f.name: strip(getattr(value, f.name)) for f in fields(value)})
            return value

        # float16 is as wide as bfloat16, which Triton's interpreter would refuse
        with torch.autocast("cpu", torch.float16) if precision == "bf16" else nullcontext():
            yield strip


def activation_bytes(config: ConceptConfig, view: View, precision: str = "fp32") -> dict[str, int]:
    """Bytes that the forward pass of one micro-batch keeps, by part; the texts of a contrastive pair included.

    The fused loss makes the gradient of the head's matrix in the forward pass; it is a gradient and not counted.
    """
    with without_content(precision) as strip:
        model = ConceptForMaskedLM(config).train()
        own = {parameter.shape for parameter in model.lm_head.parameters()}
        with saved_by_part(model, PARTS, own, num_tokens=view.encoder.num_tokens) as saved:
            kept = []
            if view.num_targets:
                task = replace(view, pair=None, lesson=None, encoder=known(config, view.encoder))
                kept.append(model(view=strip(task)))
            for texts in other_texts(view):
                kept.append(model.encoder(packed=strip(known(config, texts))))
        del kept
    return saved


def known(config: ConceptConfig, texts: Packed) -> Packed:
    """With states of a backbone, which reads what it reads on the host; a frozen one keeps nothing else."""
    return texts if config.backbone is None else texts._replace(states=torch.zeros(texts.num_tokens, config.token_dim))


def other_texts(view: View) -> list[Packed]:
    """What the encoder reads beside the task's text: of a pair, and of a teacher."""
    taught = [] if view.lesson is None else [view.lesson.texts or view.encoder]
    if view.num_targets and view.lesson is not None and view.lesson.texts is None:
        taught = []  # the concepts that the task is answered from
    return [*taught, *([] if view.pair is None else [view.pair.texts])]


def kept_bytes(config: ConceptConfig, num_tokens: int, precision: str, keep: str | None) -> int | None:
    """``encoder_activation_bytes`` of a concept encoder; None where its layers cannot keep that (see ``keep``)."""

    def build() -> nn.Module:
        encoder = ConceptEncoder(config)
        encoder.keep = keep
        return encoder

    try:
        return encoder_activation_bytes(build, num_tokens, precision)
    except ValueError as error:
        if not str(error).startswith("keep:"):
            raise
        return None


def encoder_activation_bytes(build: Callable[[], nn.Module], num_tokens: int, precision: str = "fp32") -> int:
    """Bytes that the forward pass of an encoder keeps, on one text of N tokens."""
    ids = np.zeros(num_tokens, dtype=np.int64)
    with without_content(precision) as strip:
        encoder = build().train()
        with saved_by_part(encoder, {}, num_tokens=num_tokens) as saved:
            if isinstance(encoder, ConceptEncoder):
                kept = encoder(packed=strip(known(encoder.config, pack([ids]))))
            else:
                kept = encoder(strip(torch.from_numpy(ids)[None]))
        del kept
    return sum(saved.values())


# --- the tables -------------------------------------------------------------------------------------------------------


def example_views(recipe: Recipe, tokens: SpecialTokens, config: ConceptConfig) -> list[tuple[float, View]]:
    """(share of the steps, one of their micro-batches) of each objective, over random text in windows of full length.

    With a contrastive loss as it is once that has begun, and a teacher whose vectors are known.
    """
    length = recipe.data.window
    count = max(1, recipe.batch.micro_tokens // length)
    generator = np.random.default_rng(0)
    batch = pack([generator.integers(8, tokens.vocab_size, length) for _ in range(count)])
    batch = known(config, batch) if recipe.data.states_gb else batch
    keys = [SampleKey(0, 0, i) for i in range(count)]
    objective, contrastive = countable(recipe).build_objective(), recipe.build_contrastive()
    mixed = isinstance(objective, Mixed)
    parts, weights = (objective.parts, objective.weights) if mixed else ((objective,), (1.0,))
    views = [part.view(batch, keys, tokens) for part in parts]
    if contrastive is not None:
        views = [replace(view, pair=contrastive.pair(batch, keys, tokens, range(count), part))
                 for part, view in zip(parts, views, strict=True)]  # fmt: skip
    if recipe.distill is not None:
        said = torch.zeros(count, 1), torch.zeros(count, 0, 1)
        views = [replace(view, lesson=Lesson(*said, None if reads(view.encoder, batch) else batch)) for view in views]
    return [(weight / sum(weights), view) for weight, view in zip(weights, views, strict=True)]


def countable(recipe: Recipe) -> Recipe:
    """With tokens hidden one by one where phrases are yet to be counted in the text: as many are hidden either way."""

    def plain(section: dict[str, Any]) -> dict[str, Any]:
        return {**section, "masking": "random"} if section.get("masking") == "pmi" else section

    if not recipe.needs_phrases:
        return recipe
    objective = plain(recipe.objective)
    if "parts" in objective:
        objective = {**objective, "parts": [plain(part) for part in objective["parts"]]}
    return recipe.model_copy(update={"objective": objective})


def view_flops(count: Callable[[ConceptConfig, Sizes], dict[str, int]], config: ConceptConfig, view: View) -> Counter:
    """``forward_flops`` or ``training_flops`` of a view, the texts of its pair and of its teacher included."""
    total = Counter(count(config, Sizes.of(view)) if view.num_targets else {})
    for texts in other_texts(view):
        stored = texts.states is not None
        other = count(config, Sizes(texts.num_sequences, texts.num_tokens, 0, 0, texts.max_seqlen, 0, stored))
        total.update({part: other[part] for part in encoder_flops(config, Sizes.of(view))})
    return total


def by_part(
    config: ConceptConfig, views: Sequence[tuple[float, View]], num_tokens: int, precision: str
) -> list[dict[str, Any]]:
    """One row a part, and their sum: parameters, and per token of text FLOPs and bytes of activations.

    Args:
        views: (share, view) of a micro-batch of ``num_tokens`` tokens: FLOPs are averaged, bytes are the largest.
    """
    counts, forward, training, kept = parameters(config), Counter(), Counter(), Counter()
    for share, view in views:
        for total, count in ((forward, forward_flops), (training, training_flops)):
            for part, flops in view_flops(count, config, view).items():
                total[part] += share * flops / num_tokens
        kept |= {part: size / num_tokens for part, size in activation_bytes(config, view, precision).items()}
    rows = [
        {
            "part": part, "parameters": counts.get(part, 0), "forward FLOP/token": forward[part],
            "training FLOP/token": training[part], "activation B/token": kept[part],
        }
        for part in [*PARTS, "other"] if counts.get(part) or kept[part] >= 1  # "other": a few bytes in all
    ]  # fmt: skip
    total = {name: sum(row[name] for row in rows) for name in rows[0] if name != "part"}
    return [*rows, {"part": "sum", **total}]


def by_length(config: ConceptConfig, precision: str, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """The encoder on one text of N tokens, beside full attention of equal width, layers and feed-forward."""
    rows = []
    for n in lengths:
        shape = Shape(config.hidden_size, config.iterations, config.num_attention_heads, config.intermediate_size,
                      config.vocab_size, n)  # fmt: skip
        flops = sum(encoder_flops(config, Sizes.of_text(n)).values()) / n
        full = full_attention_flops(shape.hidden_size, shape.num_layers, shape.intermediate_size, n) / n
        kept, with_keys, from_ids = (kept_bytes(config, n, precision, keep) for keep in (None, "keys", "ids"))
        full_kept = encoder_activation_bytes(lambda shape=shape: bert(shape), n, precision) / n
        rows.append({
            "N": n, "FLOP/token": flops, "full attention FLOP/token": full, "FLOP ratio": full / flops,
            "activation B/token": kept / n, "keys kept B/token": with_keys / n,
            "from ids B/token": None if from_ids is None else from_ids / n, "full attention B/token": full_kept,
            "byte ratio": full_kept * n / kept,
        })  # fmt: skip
    return rows


def screen(recipe: Recipe, config: ConceptConfig, parts: Sequence[dict], lengths: Sequence[dict]) -> str:
    """Both tables, aligned, on one screen."""
    layers = f"{config.iterations} x 1 tied layer" if config.tie_layers else f"{config.num_hidden_layers} layers"
    head = (
        f"{recipe.run.name}: width {config.hidden_size}, {layers} ({config.layer_kind}), "
        f"{config.num_concepts} concepts, vocabulary {config.vocab_size:,}; {trained_on(recipe)}\n"
        f"windows of {recipe.data.window} tokens, micro-batches of {recipe.batch.micro_tokens:,}, "
        f"{recipe.train.precision}; FLOP and bytes are per token of text"
    )
    first = aligned(
        ["part", "parameters", "forward FLOP", "training FLOP", "activation bytes"],
        [[row["part"], *(short(value) for name, value in row.items() if name != "part")] for row in parts],
    )
    if not lengths:
        return f"{head}\n\n{first}"
    second = aligned(
        ["N", "FLOP", "full attention", "times", "activation bytes", "with keys", "from ids", "full attention",
         "times"],
        [[f"{row['N']:,}", *(short(v) for name, v in row.items() if name != "N")] for row in lengths],
    )  # fmt: skip
    between = "the encoder on one text of N tokens, beside full attention of its width, depth and feed-forward"
    return "\n\n".join((head, first, between, second))


def trained_on(recipe: Recipe) -> str:
    names = [part["name"] for _, part in recipe.parts() if recipe.has_task]
    names += [name for name in ("contrastive", "distill") if getattr(recipe, name) is not None]
    return " + ".join(names)


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, all others to the right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines = [[line[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(line[1:], widths[1:], strict=True))]
             for line in [header, *rows]]  # fmt: skip
    return "\n".join("  ".join(line).rstrip() for line in lines)


def short(value: float | None) -> str:
    """Three digits and the thousands as a letter: 25.8 M."""
    if not value:
        return "-"
    for letter in ("", " K", " M", " G", " T"):
        if abs(value) < 999.5:
            return f"{value:.3g}{letter}"
        value /= 1000
    return f"{value:.3g} P"


def special_tokens(recipe: Recipe, vocabulary: int | None) -> SpecialTokens:
    """As many ids as the recipe's tokenizer has; ``pydocs`` and ``pydocs-small`` are taken to fill their vocabulary."""
    size = vocabulary
    if size is None and recipe.data.tokenizer in pydocs.NAMES:
        size = recipe.data.vocab_size
    if size is None:
        try:
            size = tokenizer.describe(tokenizer.load(recipe.data.tokenizer), recipe.data.tokenizer).tokens.vocab_size
        except InputError as error:
            raise InputError(f"{error}; to describe the model without it, add --vocabulary and its size") from None
    words = bytes([OPENS_WORD]) * size  # every token is a word
    return SpecialTokens(mask_id=1, special_ids=frozenset(range(8)), vocab_size=size, word_edges=words)


def config_of(recipe: Recipe, tokens: SpecialTokens) -> ConceptConfig:
    found, size = describe_backbone(recipe), tokens.vocab_size
    if found is None:
        return recipe.build_config(vocab_size=size, mask_token_id=tokens.mask_id)
    inner, fields = inner_config(found.described), {"backbone": found.described}
    count = recipe.model.get("backbone_layers")
    if isinstance(count, int) and 1 < count < inner.num_hidden_layers:  # training chooses which; they cost the same
        fields["backbone_layers"] = [*range(count - 1), inner.num_hidden_layers - 1]
    size = max(size, inner.vocab_size)
    return recipe.build_config(vocab_size=size, mask_token_id=tokens.mask_id, **fields)


def main(options: argparse.Namespace) -> int:
    """The command line."""
    recipe = load_recipe(options.recipe, options.overrides)
    if recipe.train.precision == "auto":
        recipe = recipe.with_precision("bf16")  # what a GPU takes
    tokens = special_tokens(recipe, options.vocabulary)
    config = config_of(recipe, tokens)
    config.iteration_sampling = "fixed"  # the average is described
    views = example_views(recipe, tokens, config)
    num_tokens = recipe.data.window * views[0][1].encoder.num_sequences
    parts = by_part(config, views, num_tokens, recipe.train.precision)
    doubling = [SHORTEST * 2**i for i in range(32) if SHORTEST * 2**i <= options.max_tokens]
    lengths = by_length(config, recipe.train.precision, doubling)
    print(screen(recipe, config, parts, lengths))
    if options.out:
        stamp = environment()
        write_results(options.out, "parts", parts, stamp, title=f"{recipe.run.name}: cost by part")
        write_results(options.out, "lengths", lengths, stamp, title=f"{recipe.run.name}: the encoder against N")
        print(f"\nwritten to {options.out}")
    return 0
