"""All that a recipe reads, made ahead: on a machine without a GPU, before the one with it is paid for."""

import argparse

from .data.cache import cache_folder
from .data.states import GB
from .jobs.peer import finetuning
from .jobs.pretraining import PretrainingJob, counted
from .launching import launch
from .launching.launch import World
from .recipe.finetune import Finetune
from .recipe.load import load_any
from .recipe.schema import Recipe


def main(options: argparse.Namespace) -> None:
    """The command line: tokenises the text, trains the tokenizer and counts phrases where they are asked for, and
    embeds what a teacher is to say, into the cache that the run will read. Of text that is streamed, the first block.
    Stopped or killed, it goes on with the text that is not tokenised yet when it is started again.

    Of a recipe that learns a task: fetches and reads the source and the task, checks that its texts fit and that the
    model can be had, and makes the states of a frozen backbone where ``task.states_gb`` gives them room."""
    recipe = load_any(options.recipe, options.overrides)
    with launch.world(recipe.run.join_minutes) as world:
        made = of_task(recipe, world) if isinstance(recipe, Finetune) else of_text(recipe, world)
        if world.is_first:
            print(f"ready: {made}")


def of_text(recipe: Recipe, world: World) -> str:
    job = PretrainingJob(counted(recipe, world), world)
    return f"{job.describe()}; held out: {job.corpus.validation.num_tokens:,} tokens"


def of_task(recipe: Finetune, world: World) -> str:
    train = recipe.train.model_copy(update={"compile": False})  # nothing is trained here, nor need a compiler be
    job = finetuning(recipe.model_copy(update={"train": train}), world)
    job.build(is_new=True)
    if recipe.task.states_gb is None:
        return f"{job.describe()}; nothing to store"
    stores = [store for loader in (job.loader, job.held_out) for store in loader.stores]
    num_tokens = sum(store.windows.num_tokens for store in stores)
    size = sum(2 * store.windows.num_tokens * store.width for store in stores)
    where = cache_folder(recipe.task.cache)
    return f"{job.describe()}; states of {num_tokens:,} tokens, {size / GB:.2g} GB, in {where}"
