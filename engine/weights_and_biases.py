"""Weights & Biases, where `logging.wandb` names a project: the numbers of metrics.jsonl, sent by rank 0."""

import importlib.util
import secrets
from pathlib import Path
from typing import Any

from .errors import InputError
from .recipe.schema import Training

OTHERWISE = "or leave logging.wandb out"


def check_project(recipe: Training) -> None:
    """Refuses a project where the package is missing, before anything is written."""
    if recipe.logging.wandb is None:
        return
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # without one it is a folder, such as W&B makes where it is used
        raise InputError(f"logging.wandb: the package wandb is not installed; pip install wandb, {OTHERWISE}")


def open_project(folder: Path, recipe: Training) -> Any:
    """The run of W&B that belongs to this run's folder, the same one when it is resumed; ``log`` and ``finish`` it.

    Where it goes, and whether it is sent at all, are W&B's own variables (WANDB_MODE=offline, WANDB_ENTITY, ...). Steps
    that are trained again after a crash have the same numbers, and W&B leaves them out.

    Raises:
        InputError: it cannot be opened, such as without an account.
    """
    import wandb

    identity = folder / "wandb.id"
    if not identity.exists():
        identity.write_text(secrets.token_hex(4), encoding="utf-8")
    try:
        return wandb.init(
            project=recipe.logging.wandb, name=folder.name, id=identity.read_text(encoding="utf-8"), resume="allow",
            dir=str(folder), config=recipe.resolved(), settings=wandb.Settings(console="off", silent=True),
        )  # fmt: skip
    except wandb.Error as error:
        told = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"logging.wandb: {told}; wandb login, set WANDB_MODE=offline, {OTHERWISE}") from error
