"""The command line: one thin function per subcommand.

A launcher may put `--local_rank=K` in front of the subcommand (the `deepspeed` launcher does); it is accepted, and the
environment variables that say the same are used. Bad input ends with one line on standard error and exit code 2.
"""

import argparse
import os
import sys
from pathlib import Path


def train(arguments: argparse.Namespace) -> int:
    from .engine.trainer import train

    train(arguments.recipe, arguments.overrides)
    return 0


def generate(arguments: argparse.Namespace) -> int:
    from .engine.data.sources import read_text
    from .engine.errors import InputError
    from .engine.generate import generate
    from .models.generation.sampling import Sampling

    try:
        sampling = Sampling(
            steps=arguments.steps, schedule=arguments.schedule, unmask=arguments.unmask, remask=arguments.remask,
            block=arguments.block, guidance=arguments.guidance, temperature=arguments.temperature,
            top_k=arguments.top_k, top_p=arguments.top_p, clean_up=arguments.clean_up, seed=arguments.seed,
        )  # fmt: skip
    except ValueError as error:
        raise InputError(f"--{error}") from error
    text = arguments.text if arguments.file is None else read_text(Path(arguments.file))
    samples = generate(
        arguments.checkpoint, text, mode=arguments.mode, sampling=sampling, length=arguments.length,
        read_once=arguments.read_once, num_samples=arguments.samples,
    )  # fmt: skip
    print("\n---\n".join(samples))
    return 0


def analyze(arguments: argparse.Namespace) -> int:
    from .bench.analyze import analyze

    analyze(arguments.path, arguments.text)
    return 0


def compile_kernels(arguments: argparse.Namespace) -> int:
    from .kernels.compile import main

    return main(arguments.rest)


def describe(arguments: argparse.Namespace) -> int:
    from .bench.describe import main

    return main(arguments.rest)


def bench(arguments: argparse.Namespace) -> int:
    """Each benchmark reads its own options."""
    match arguments.what:
        case "kernels":
            from .bench.kernels.run import main
        case "scaling":
            from .bench.scaling import main
        case "memory":
            from .bench.memory import main
        case "step":
            from .bench.step import main
        case "ablation":
            from .bench.ablation import main
        case "meaning":
            from .bench.meaning import main
        case "suite":
            from .bench.suite import main
        case "report":
            from .bench.report import main
        case "compare":
            from .bench.compare import main
    return main(arguments.rest)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="conceptron", description="Encoders that read long text through concepts.")
    top.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("train", help="run a recipe: one process, or one of several under a launcher")
    command.add_argument("recipe", help="a YAML file, or the name of a shipped one such as pretrain/mlm.yaml")
    command.add_argument("overrides", nargs="*", metavar="section.field=value")
    command.set_defaults(run=train)

    command = commands.add_parser("generate", help="fill or generate text with a trained checkpoint")
    command.add_argument("checkpoint", help="a Hugging Face folder, such as runs/demo/model")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="the text to read")
    source.add_argument("--file", help="a UTF-8 file to read instead")
    command.add_argument("--mode", choices=("prefix", "fill", "infill", "concepts"), default="prefix", help=(
        "prefix: continue the text; fill: replace each [MASK] in it by a token; infill: by --length tokens; "
        "concepts: write it again from its concepts alone"
    ))  # fmt: skip
    command.add_argument("--length", type=int, help="tokens to write; 32, for concepts as many as the text has")
    command.add_argument("--read-once", action="store_true", help=(
        "encode the given text only, not what is written (for models trained with prefix_diffusion)"
    ))  # fmt: skip
    command.add_argument("--steps", type=int, default=16, help="denoising steps")
    command.add_argument("--schedule", choices=("linear", "cosine"), default="cosine", help="how many tokens a step")
    command.add_argument("--unmask", default="confidence", help=(
        "which come first: confidence, margin, entropy, random; mdlm: ancestral; remdm: and some are hidden again"
    ))  # fmt: skip
    command.add_argument("--remask", type=float, default=0.1, help="share that remdm hides again in a step")
    command.add_argument("--block", type=int, default=0, help="tokens written at a time, left to right; 0: all")
    command.add_argument("--guidance", type=float, default=0.0, help="strength w of guidance by the concepts")
    command.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    command.add_argument("--top-k", type=int, default=0, help="draw from the k most likely tokens; 0: from all")
    command.add_argument("--top-p", type=float, default=1.0, help="draw from the fewest tokens of this probability")
    command.add_argument("--clean-up", action="store_true", help="the last step takes the most likely tokens")
    command.add_argument("--samples", type=int, default=1)
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=generate)

    command = commands.add_parser("analyze", help="report on a run folder or a checkpoint: plots, figures, gates")
    command.add_argument("path", help="runs/NAME, or a Hugging Face folder")
    command.add_argument("--text", nargs="+", default=[], metavar="FILE", help="held-out text for a bare checkpoint")
    command.set_defaults(run=analyze)

    command = commands.add_parser("describe", add_help=False, help="what the model of a recipe costs, before training")
    command.set_defaults(run=describe, takes_rest=True)

    command = commands.add_parser("bench", add_help=False, help="measure operators, scaling, memory, steps, choices")
    command.add_argument(
        "what", choices=("kernels", "scaling", "memory", "step", "ablation", "meaning", "suite", "report", "compare")
    )
    command.set_defaults(run=bench, takes_rest=True)

    kernels = commands.add_parser("kernels", help="what the Triton operators compile to").add_subparsers(
        required=True, metavar="ACTION"
    )
    command = kernels.add_parser("compile", add_help=False, help="compile every shipped configuration, without a GPU")
    command.set_defaults(run=compile_kernels, takes_rest=True)
    return top


def main(argv: list[str] | None = None) -> int:
    # Threads that spin while they wait would crawl beside another program; it is read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments, rest = parser().parse_known_args(argv)
    if rest and not getattr(arguments, "takes_rest", False):
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    from .engine.errors import InputError

    try:
        return arguments.run(arguments)
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":  # the other ranks met the same fault
            print(f"conceptron: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
