"""Loading a checkpoint with another number of concepts, or for texts longer than its table of positions.

A module with a parameter that follows such a size says in ``RESIZE`` how each of its first dimensions does:
``{"table.weight": ("positions",)}``.
"""

import copy

import torch
from torch import Tensor
from transformers.utils import logging

SIZES = ("num_concepts", "max_position_embeddings")
DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")

logger = logging.get_logger(__name__)


class LoadsOtherSizes:
    """Before ``PreTrainedModel`` in a list of bases: ``from_pretrained(folder, num_concepts=other)`` works."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """As in transformers; what was saved with another num_concepts or max_position_embeddings than is asked for,
        in ``kwargs`` or ``config``, is loaded as it is and then resized (``resized``), which one line of the log says.

        Raises:
            ValueError: a parameter cannot be resized; the message names it and says why.
        """
        sizes = {name: kwargs.pop(name) for name in SIZES if name in kwargs}
        if pretrained_model_name_or_path is not None and isinstance(config, cls.config_class):
            options = {name: kwargs[name] for name in DOWNLOAD_OPTIONS if name in kwargs}
            sizes = {name: getattr(config, name) for name in SIZES} | sizes
            config = with_sizes(config, **saved_sizes(cls.config_class, pretrained_model_name_or_path, **options))
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        model = resized(model, *model_args, **sizes)
        return (model, *loaded[1:]) if isinstance(loaded, tuple) else model


def resized(model, *model_args, **sizes: int):
    """The same model with other ``SIZES``; itself, where they are what it has.

    Concepts keep the part of the text that they stand for: new ones lie on the straight line through the two that are
    nearest, a row of initial concepts as long as they are. Learned positions are stretched, so that the first and the
    last stay (align corners). Everything else is copied.

    Raises:
        ValueError: a size is not one, or a parameter cannot follow it; or ZeRO-3 has already cut the model to pieces.
    """
    old = model.config
    sizes = {name: size for name, size in sizes.items() if size != getattr(old, name)}
    if not sizes:
        return model
    what = ", ".join(f"{name} {getattr(old, name)} -> {size}" for name, size in sizes.items())
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(f"{what}: ZeRO-3 has partitioned the model; load it without, save it, and load that")
    config = with_sizes(old, **sizes)
    config.check()
    other = type(model)(config, *model_args).to(device=model.device, dtype=model.dtype).train(model.training)
    state, wanted, rules, changed = model.state_dict(), other.state_dict(), resize_rules(model), []
    for name, target in wanted.items():
        if state[name].shape != target.shape:
            shapes = f"{name} {list(state[name].shape)} -> {list(target.shape)}"
            state[name] = resize(state[name], target.shape, rules.get(name, ()), f"{what}: {shapes}")
            changed.append(shapes)
    other.load_state_dict(state)
    say = logger.warning if changed else logger.info  # such as a trained length, on which RoPE does not depend
    say(f"resized for {what}: {', '.join(changed) or 'no parameter depends on it'}")
    return other


def saved_sizes(config_class: type, name_or_path, **options) -> dict[str, int]:
    """The ``SIZES`` of a checkpoint; none of one that is nothing but weights, which then has to fit as it is."""
    fields, _ = config_class.get_config_dict(name_or_path, **options)
    if fields.get("model_type") != config_class.model_type:
        return {}
    saved = config_class.from_dict(fields)
    return {name: getattr(saved, name) for name in SIZES}


def with_sizes(config, **sizes: int):
    """A copy of ``config``, not checked."""
    config = copy.deepcopy(config)
    for name, size in sizes.items():
        setattr(config, name, size)
    return config


def resize_rules(model) -> dict[str, tuple[str, ...]]:
    """Full name of each parameter that may be resized -> what each of its first dimensions is."""
    return {
        f"{prefix}.{name}" if prefix else name: rule
        for prefix, module in model.named_modules()
        for name, rule in getattr(module, "RESIZE", {}).items()
    }


def resize(values: Tensor, shape: torch.Size, rule: tuple[str, ...], what: str) -> Tensor:
    """values of another shape -> [*shape], one dimension after the other; ``what`` opens an error."""
    for dim, (old, new) in enumerate(zip(values.shape, shape, strict=True)):
        if old == new:
            continue
        if dim >= len(rule):
            raise ValueError(f"{what} cannot be resized: nothing says how dimension {dim} follows")
        if old == 1:
            raise ValueError(f"{what} cannot be resized: one row has nothing to tell {new} apart by")
        where = corner_places(old, new) if rule[dim] == "positions" else part_places(old, new)
        rows = between(values.movedim(dim, 0), where.to(values.device))
        if rule[dim] == "concept rows":
            norms = values.norm(dim=-1)
            rows = torch.nn.functional.normalize(rows, dim=-1) * between(norms, where.clamp(0, old - 1))[:, None]
        values = rows.movedim(0, dim)
    return values


def corner_places(old: int, new: int) -> Tensor:
    """[new] float64 places among ``old`` rows, the first at the first and the last at the last."""
    return torch.arange(new, dtype=torch.float64) * (old - 1) / max(new - 1, 1)


def part_places(old: int, new: int) -> Tensor:
    """[new] float64 places among ``old`` rows: (j + 1/2) / new = (i + 1/2) / old, middles of equal parts of a text."""
    return ((2 * torch.arange(new, dtype=torch.float64) + 1) * old - new) / (2 * new)


def between(rows: Tensor, where: Tensor) -> Tensor:
    """rows [n, ...] at places [m], on the straight line through the two nearest -> [m, ...]."""
    below = where.floor().clamp(0, rows.shape[0] - 2)
    share = (where - below).to(rows.dtype).view(-1, *[1] * (rows.ndim - 1))
    low = below.long()
    return torch.lerp(rows[low], rows[low + 1], share)
