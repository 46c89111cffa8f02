"""All that a recipe reads, made ahead: on a machine without a GPU, before the one with it is paid for."""

import argparse

from .jobs.pretraining import PretrainingJob, counted
from .launching import launch
from .recipe.load import load_recipe


def main(options: argparse.Namespace) -> None:
    """The command line: tokenises the text, trains the tokenizer and counts phrases where they are asked for, and
    embeds what a teacher is to say, into the cache that the run will read. Of text that is streamed, the first block.
    Stopped or killed, it goes on with the text that is not tokenised yet when it is started again."""
    recipe = load_recipe(options.recipe, options.overrides)
    with launch.world(recipe.run.join_minutes) as world:
        job = PretrainingJob(counted(recipe, world), world)
        if world.is_first:
            print(f"ready: {job.describe()}; held out: {job.corpus.validation.num_tokens:,} tokens")
