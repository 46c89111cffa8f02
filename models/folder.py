"""The folder of a saved model, ours or of transformers, looked at before anything is loaded from it.

Every fault is a ``ValueError`` of one line: which file, what is wrong with it, what to do.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
AGAIN = "copy or download it again"


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of config.json, ``model_type`` among them.

    Raises:
        ValueError: see above.
    """
    file = folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected the folder of a model, got a file; give the folder it lies in")
    if not file.is_file():
        found = "a link to nothing" if file.is_symlink() else "no config.json"
        raise ValueError(f"{folder}: {found}; expected a Hugging Face folder such as runs/demo/model")
    fields = read_json(file)
    if not isinstance(fields, dict):
        raise ValueError(f"{file}: expected an object with model_type, got {named(fields)}; {AGAIN}")
    if not isinstance(fields.get("model_type"), str):
        raise ValueError(f"{file}: expected text as model_type, got {named(fields.get('model_type'))}; {AGAIN}")
    return fields


def read_json(file: Path) -> Any:
    """
    Raises:
        ValueError: the file cannot be read, is no JSON, or is nested too deeply to be one of a model.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}); {AGAIN}") from error
    except RecursionError:
        raise ValueError(f"{file}: nested too deeply to be a file of a model; {AGAIN}") from None
    except ValueError as error:  # also of bytes that are not UTF-8
        raise ValueError(f"{file}: not JSON ({' '.join(str(error).split())[:100]}); {AGAIN}") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a model, one or those that its index lists, each with a head that can be read.

    Raises:
        ValueError: see above.
    """
    index = folder / INDEX
    names = {SINGLE}
    if index.is_file():
        tree = read_json(index)
        places = tree.get("weight_map") if isinstance(tree, dict) else None
        if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
            raise ValueError(f"{index}: expected a weight_map from tensors to files; {AGAIN}")
        names = set(places.values())
    for name in sorted(names):
        file = folder / name
        if not file.is_file():
            pickled = "; pickled weights are never read" if any(folder.glob("*.bin")) else ""
            remedy = "load the model elsewhere and save it with save_pretrained"
            raise ValueError(f"{folder}: expected {name}, which is not there{pickled}; {remedy}")
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            size = f"{file.stat().st_size} bytes"
            raise ValueError(f"{file}: damaged ({size}; {' '.join(str(error).split())}); {AGAIN}") from error
    return [folder / name for name in sorted(names)]


def of_other_shapes(info: dict[str, Any]) -> str:
    """What ``from_pretrained(..., ignore_mismatched_sizes=True, output_loading_info=True)`` could not place, in words;
    "" if everything that the folder has was of the right shape."""
    for name, saved, wanted in sorted(info["mismatched_keys"]):
        more = f", and {len(info['mismatched_keys']) - 1} more" if len(info["mismatched_keys"]) > 1 else ""
        return f"{name} has shape {list(saved)}, the model {list(wanted)}{more}"
    return ""


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The first of these tensors that holds a NaN or an infinity, in words; "" if none does."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            count = tensor.numel() - int(tensor.isfinite().sum())
            return f"{count} of the {tensor.numel()} numbers of {name} are not finite"
    return ""


def named(value: Any) -> str:
    """A JSON value in a few words."""
    if isinstance(value, dict | list):
        return {dict: "an object", list: "a list"}[type(value)]
    text = json.dumps(value, allow_nan=True)
    return "nothing" if value is None else text if len(text) <= 40 else text[:37] + "..."
