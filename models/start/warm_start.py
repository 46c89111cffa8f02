"""Starting a model with tied layers from a checkpoint whose layers are not tied."""

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from ..folder import weight_files
from ..pretrained import ConceptPreTrainedModel

LAYERS = "layers."


@dataclass(frozen=True)
class WarmStart:
    """What became of every tensor of the checkpoint, and of the model."""

    loaded: tuple[str, ...]  # tensors of the model that were filled from one of the same name
    mapped: dict[str, str]  # tensor of the model -> the one it was filled from, under another name
    skipped: dict[str, str]  # tensor of the checkpoint -> why it was not used
    new: tuple[str, ...]  # tensors of the model that keep their initial values

    def __str__(self) -> str:
        counts = ", ".join(
            f"{len(part)} {name}"
            for name, part in zip(("loaded", "mapped", "skipped", "new"), vars(self).values(), strict=True)
        )
        lines = [f"{to} <- {source}" for to, source in self.mapped.items()]
        lines += [f"{source}: skipped, {why}" for source, why in self.skipped.items()]
        return "\n".join([counts, *lines, *(f"{name}: new" for name in self.new)])


def warm_start_tied(model: ConceptPreTrainedModel, folder: str | Path, layer: int = 0) -> WarmStart:
    """Fills a model with tied layers from a saved model without: its layer number ``layer`` becomes the tied one.

    Everything else that has the same name and shape is loaded too: embeddings, concepts, decoder, head. Either side may
    be a ``ConceptEncoder``, or a model that has one as ``encoder``.

    Args:
        folder: as ``save_pretrained`` writes it, with safetensors.

    Raises:
        ValueError: the model's layers are not tied, no tensor fits its tied layer, which would start at random, or the
            folder has no safetensors that can be read.
    """
    if not model.config.tie_layers:
        raise ValueError("model: expected tie_layers = true, got false; use from_pretrained for untied layers")
    tensors, target = read_tensors(Path(folder)), model.state_dict()
    prefixes = ["encoder." if any(name.startswith("encoder.") for name in names) else "" for names in (tensors, target)]
    filled, skipped = {}, {}
    for source, value in sorted(tensors.items()):
        name = rename(source, *prefixes, layer)
        if name is None:
            skipped[source] = f"of a layer other than {layer}"
        elif name not in target:
            skipped[source] = "the model has no such tensor"
        elif target[name].shape != value.shape:
            skipped[source] = f"expected shape {list(target[name].shape)}, got {list(value.shape)}"
        else:
            filled[name] = source
    if not any(name.startswith(prefixes[1] + LAYERS) for name in filled):
        raise ValueError(f"{folder}: no tensor of layer {layer} fits the tied layer; are kind and width the same?")
    for name, source in filled.items():
        target[name].copy_(tensors[source])
    memory = {target[name].data_ptr() for name in filled}  # tied weights are one tensor of several names
    return WarmStart(
        loaded=tuple(name for name, source in filled.items() if name == source),
        mapped={name: source for name, source in filled.items() if name != source},
        skipped=skipped,
        new=tuple(name for name, value in target.items() if value.data_ptr() not in memory),
    )


def rename(source: str, source_prefix: str, prefix: str, layer: int) -> str | None:
    """The name in the model of a tensor of the checkpoint; None for one of another layer."""
    if not source.startswith(source_prefix):
        return source  # of the decoder or a head
    name = source.removeprefix(source_prefix)
    if not name.startswith(LAYERS):
        return prefix + name
    number, rest = name.removeprefix(LAYERS).split(".", 1)
    return f"{prefix}{LAYERS}0.{rest}" if int(number) == layer else None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a saved model by name, from one file or from those that its index lists."""
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}
