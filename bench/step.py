"""How fast a recipe trains on this machine, and where a step's time goes.

    conceptron bench step RECIPE [section.field=value ...] [--synthetic] [--steps 10] [--out runs/bench/step]
    conceptron bench step seeds-diffusion-l2 --synthetic
    conceptron bench step demo.yaml --bare 40           beside a bare loop of torch, as ``engine_overhead``

The recipe's own model, data, batches and engine run for a few steps. Reported: tokens per second, model FLOPs
utilisation (``flops.py`` over the matmul rate measured in the same run), time of data, forward, backward and optimizer,
of each part of the model, and what padding would have cost. A contrastive loss and regularisers are in the times, but
not in the FLOPs. Data loading is also timed alone: a loader that is slower than the rest of a step starves the device.
On a GPU, NVML's power, clocks, throttling and energy per million tokens.
``--synthetic`` reads random tokens in windows of full length, so that no corpus is needed; of the tokenizer only its
size is asked, which ``--vocabulary`` gives where it cannot be opened. What is timed is the trainer's own ``update``.

RECIPE is a file, a shipped recipe such as ``pretrain/mlm.yaml``, or one of the presets ``PRESETS``: the configurations
of the seeds' runs.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..engine import zero
from ..engine.data import tokenizer
from ..engine.data.corpus import Corpus
from ..engine.data.stages import Stages
from ..engine.data.windows import Part, Windows, cut
from ..engine.errors import InputError
from ..engine.jobs.pretraining import PretrainingJob, counted
from ..engine.launching import launch
from ..engine.meter import Stopwatch, matmul_flops, synchronize
from ..engine.nvml import monitor_of
from ..engine.optimizing.optimizer import build_optimizer
from ..engine.optimizing.schedule import learning_rate
from ..engine.precision import settled
from ..engine.recipe.load import load_recipe
from ..engine.recipe.schema import Recipe
from ..engine.update import update
from ..models.flops import view_flops
from ..models.objectives.view import View
from ..models.recursion import draw_iterations
from .describe import special_tokens
from .measure.environment import environment
from .measure.overhead import Bare, overhead
from .measure.results import markdown_table, write_results

PARTS = {  # part -> module of ConceptForMaskedLM
    "backbone": "encoder.backbone", "encoder": "encoder", "decoder": "decoder", "head": "lm_head",
}  # fmt: skip
SEEDS_TOKENIZER = "answerdotai/ModernBERT-base"
SEEDS_VOCABULARY = 50368  # its ids, so that it need not be fetched
AS_THE_SEEDS = ("objective.encoder_view=clean", "objective.weighting=selfnorm", "train.label_smoothing=0.1")
SIX_LAYERS = ("model.num_hidden_layers=6", "model.intermediate_size=2048", "batch.tokens=262144")
PRESETS: dict[str, tuple[str, ...]] = {  # name -> recipe and what the seeds' run changes in it
    "seeds-diffusion-l2": ("pretrain/diffusion.yaml", *AS_THE_SEEDS),
    "seeds-diffusion-l6": ("pretrain/diffusion.yaml", *AS_THE_SEEDS, *SIX_LAYERS),
    "seeds-mlm-l2": ("pretrain/mlm.yaml", "objective.probability=0.15"),
    "seeds-mlm-l6": ("pretrain/mlm.yaml", "objective.probability=0.15", *SIX_LAYERS),
}


def synthetic(recipe: Recipe, vocabulary: int | None, window: int) -> Corpus:
    """A million random tokens in windows of full length; as many ids as the recipe's tokenizer has.

    The tokenizer itself is opened only where a backbone is checked against it or a teacher reads text.
    """
    special = special_tokens(recipe, vocabulary)
    tokens = np.random.default_rng(0).integers(8, special.vocab_size, 1 << 20).astype(np.uint32)
    windows = Windows([Part(tokens, *cut(np.array([0, len(tokens)]), np.array([0]), window))])
    words: Any = SimpleNamespace(pad_token_id=None)
    if recipe.model.get("backbone") is not None or recipe.distill is not None:
        words = tokenizer.with_mask(tokenizer.load(recipe.data.tokenizer))
    return Corpus(windows, windows, words, special, {"tokenizer": {"id": recipe.data.tokenizer}})


def part_times(
    model: nn.Module, engine: Any, view: View, device: torch.device, num_iterations: int | None = None
) -> dict[str, float]:
    """Milliseconds of forward and of backward of each part, for one micro-batch of the task.

    The device is waited for at every boundary, so the sum is a little more than an undisturbed pass takes. Backward
    runs through the parts in turn: the head's is over when the gradient of the decoder's output has come, the
    decoder's when that of the concepts has, and the rest is the encoder's.
    """
    ms: dict[str, float] = {}
    mark = 0.0

    def lap(name: str | None = None) -> None:
        nonlocal mark
        synchronize(device)
        now = time.perf_counter()
        if name is not None:
            ms[name] = ms.get(name, 0.0) + (now - mark) * 1e3
        mark = now

    handles = []
    for part, attribute in PARTS.items():
        if part == "backbone" and getattr(model.encoder, "backbone", None) is None:
            continue
        module = model.get_submodule(attribute)
        handles.append(module.register_forward_pre_hook(lambda m, i: lap()))
        handles.append(module.register_forward_hook(lambda m, i, o, part=part: lap(f"{part} forward")))
    arrived = {"decoder": "head backward", "encoder": "decoder backward"}
    for attribute, name in arrived.items():
        def watch(module: nn.Module, given: Any, out: Any, name: str = name) -> None:
            tensor = out if isinstance(out, torch.Tensor) else out.last_hidden_state
            tensor.register_hook(lambda grad: lap(name))

        handles.append(getattr(model, attribute).register_forward_hook(watch))
    try:
        engine.set_gradient_accumulation_boundary(True)
        loss = engine(view=view, num_iterations=num_iterations).loss
        lap()
        engine.backward(loss)
        lap("encoder backward")
        engine.step()
    finally:
        for handle in handles:
            handle.remove()
    return {f"{name}_ms".replace(" ", "_"): value for name, value in ms.items()}


def padding_waste(loader: Stages, steps: Sequence[int]) -> float:
    """Share of rows that would be padding if each step's windows were padded to its longest."""
    lengths = [loader.at(step).windows.lengths[loader.windows(step)] for step in steps]
    return 1 - sum(int(n.sum()) for n in lengths) / sum(int(n.max()) * len(n) for n in lengths)


def run(
    recipe: Recipe, num_steps: int, warm_up: int, use_synthetic: bool, vocabulary: int | None = None,
    num_bare: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Every figure of one recipe on this device, as a flat row. ``vocabulary``: of synthetic tokens, see above.

    ``num_bare``: as many more steps are taken twice, with the engine and with a bare loop.
    """
    with launch.world() as world:
        if num_bare and world.size > 1:
            raise InputError("--bare: expected 0 on several ranks: a bare loop has nobody to share gradients with")
        world = world.divided(recipe.train.sequence_ranks)
        recipe, corpora = settled(recipe, world), None
        if use_synthetic:
            corpora = [synthetic(recipe, vocabulary, window) for _, window in recipe.stages()]
        else:
            recipe = counted(recipe, world)
        job = PretrainingJob(recipe, world, corpora)
        loader = job.loader
        torch.manual_seed(recipe.run.seed)
        whole = job.build(is_new=True).to(world.device).train()
        model, config = whole.model, whole.model.config
        bare = Bare(job.build(is_new=True).to(world.device).train(), recipe, world.device) if num_bare else None
        engine = zero.initialize(whole, build_optimizer(whole, recipe.optim), recipe)
        steps = range(warm_up, warm_up + num_steps)

        start = time.perf_counter()
        batches = [loader.step(step) for step in steps]
        alone_s = time.perf_counter() - start
        flops = sum(view_flops(config, view) for views in batches for view in views)
        num_tokens = sum(job.num_tokens(step) for step in steps)
        del batches

        watch, monitor = Stopwatch(world.device), monitor_of(world.device)

        def take(step: int, views: list[View]) -> None:
            lr = learning_rate(step, recipe.optim, recipe.train.steps)
            update(engine, world, job, step, views, lr=lr, seed=recipe.run.seed, lap=watch.lap)

        for step in range(warm_up):
            take(step, loader.step(step))
        with monitor:
            watch.begin()
            for step, views in zip(steps, job.batches(steps.start, steps.stop), strict=True):
                take(step, views)
            seconds = watch.take()
        total_s = sum(seconds.values())
        beside = {}
        if bare is not None:
            more = range(steps.stop, steps.stop + num_bare)
            given = [(step, loader.step(step)) for step in more]
            bare.step(job, *given[0], 0.0)
            beside = overhead(bare, job, recipe.optim.lr, given, take)
        view = replace(loader.step(steps.start)[0].to(world.device), pair=None)
        draw = draw_iterations(config, (recipe.run.seed, steps.start))
        parts = part_times(model, engine, view, world.device, draw) if recipe.has_task else {}
        rate = matmul_flops(world.device, torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32)

    return {
        "vocabulary": config.vocab_size, "text": "random tokens" if use_synthetic else "the recipe's",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens_per_step": num_tokens / num_steps, "tokens_per_s": num_tokens / total_s,
        "step_ms": total_s / num_steps * 1e3,
        **{f"{phase}_ms": passed / num_steps * 1e3 for phase, passed in seconds.items()}, **beside,
        "data_alone_ms": alone_s / num_steps * 1e3, "data_alone_tokens_per_s": num_tokens / alone_s,
        "starved": seconds["data"] > 0.05 * total_s,
        "tflops": flops / total_s / 1e12, "matmul_tflops": rate / 1e12, "mfu": flops / total_s / rate,
        "padding_avoided": padding_waste(loader, steps), "batch_filled": loader.at(steps.start).efficiency,
        **parts,
        **monitor.summary(num_tokens),
    }  # fmt: skip


def main(options: argparse.Namespace) -> int:
    """The command line; the recipe may be a preset of ``PRESETS``."""
    source, *preset = PRESETS.get(options.recipe, (options.recipe,))
    recipe = load_recipe(source, [*preset, *options.overrides])
    stamp = environment(recipe.run.seed)
    if options.vocabulary and not options.synthetic:
        raise InputError("--vocabulary: of random tokens only; add --synthetic, or leave it out")
    vocabulary = options.vocabulary
    if vocabulary is None and recipe.data.tokenizer == SEEDS_TOKENIZER and options.recipe in PRESETS:
        vocabulary = SEEDS_VOCABULARY
    row = run(recipe, options.steps, options.warm_up, options.synthetic, vocabulary, options.bare)
    name = Path(options.recipe).stem
    rows = [{"recipe": options.recipe, **row}]
    write_results(options.out, name, rows, stamp, title=f"Training step: {name}")
    print(markdown_table([{"figure": key, "value": value} for key, value in row.items()], ["figure", "value"]))
    print(f"written to {options.out / name}.json")
    return 0
