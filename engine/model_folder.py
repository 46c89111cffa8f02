"""The folder of a model as a recipe or a command names it: found here or on the hub, and its faults in one line."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from ..models.folder import read_config, weight_files
from .errors import InputError

FILES = ("*.json", "*/config.json", "*.safetensors", "*.txt", "*.model", "README.md")  # no pickles, no code
HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
EXPECTED = "give a folder with config.json and safetensors, or a hub id org/name"
# what transformers and safetensors raise when a file says what no model can be made of
DAMAGE = (
    OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError, StrictDataclassError,
)  # fmt: skip


def find(source: str, field: str, files: tuple[str, ...] = FILES, expected: str = EXPECTED) -> Path:
    """The folder itself, or what the hub has under this name; offline, what the hub's cache has.

    Args:
        field: of the recipe or the command line, for the error.
        files: patterns of those that are fetched.
        expected: what to do instead, for the error.

    Raises:
        InputError: it is a file or a link to nothing, or there is no such folder here and no such model to be had.
    """
    folder = here(source, field, expected)
    if folder is not None:
        return folder
    try:
        return Path(snapshot_download(source, allow_patterns=list(files)))
    except Exception as error:  # huggingface_hub has dozens of kinds
        raise InputError(
            f"{field}: {source}: no such folder here, and it cannot be fetched from the hub "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); {expected}"
        ) from error


def here(source: str, field: str, expected: str) -> Path | None:
    """The folder of this name; None where only the hub can have it.

    Raises:
        InputError: it is a file or a link to nothing, or no folder and no name of the hub either.
    """
    shown = source[:200] if source.isprintable() and source else repr(source[:200])
    try:
        folder = Path(source).expanduser()
        exists = folder.exists() and source != ""
    except (OSError, RuntimeError, ValueError) as error:  # a name that no file can have, a home that nobody has
        raise InputError(f"{field}: {shown}: not a path ({str(error)[:40]}); {expected}") from error
    if exists and not folder.is_dir():
        raise InputError(f"{field}: {source}: expected a folder, got a file; {expected}")
    if not exists and folder.is_symlink():
        raise InputError(f"{field}: {source}: a link to {os.readlink(folder)}, which is not there; mend the link")
    if not exists and not HUB_ID.fullmatch(source):
        raise InputError(f"{field}: {shown}: no such folder here; {expected}")
    return folder if exists else None


def of_run(folder: Path) -> Path:
    """A run's folder stands for the model in it, which may not be there yet."""
    return folder / "model" if (folder / "recipe.yaml").is_file() else folder


def finished(place: str, where: str) -> str:
    """The same of a name that may be one of the hub; ``where``: the beginning of the error.

    Raises:
        InputError: the run has no model yet.
    """
    folder = Path(place).expanduser()
    model = of_run(folder)
    if model == folder:
        return place
    if not model.is_dir():
        raise InputError(f"{where}: the run has not finished, it has no model yet; go on with resume=auto")
    return str(model)


def inspect(folder: Path, field: str | None = None) -> str:
    """The model type of a folder whose config.json and safetensors can be read.

    Raises:
        InputError: they cannot.
    """
    with in_one_line(folder, field):
        kind = read_config(folder)["model_type"]
        weight_files(folder)
    return kind


def kind_of(folder: Path, field: str | None = None) -> str | None:
    """`inspect`; None where there is no config.json."""
    return inspect(folder, field) if (folder / "config.json").is_file() else None


@contextmanager
def in_one_line(place: str | Path, field: str | None = None) -> Iterator[None]:
    """Around what opens a folder that somebody gave as ``field``: what is wrong with it, as InputError."""
    where = f"{field}: " if field else ""
    try:
        yield
    except InputError:
        raise
    except RecursionError as error:
        raise InputError(f"{where}{place}: a file of it is nested too deeply; get the model again") from error
    except DAMAGE as error:
        line = " ".join(str(error).split())
        line = line if len(line) <= 300 else f"{line[:297]}..."
        text = line if isinstance(error, ValueError) and line else f"{type(error).__name__}: {line}"
        raise InputError(where + (text if str(place) in text else f"{place}: {text}")) from error


def has_tokenizer(folder: Path) -> bool:
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "*.model")
    return any(any(folder.glob(name)) for name in names)
