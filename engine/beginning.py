"""The model of a recipe before its first step: drawn, or with first weights from elsewhere."""

from typing import NamedTuple

from ..models.masked_lm import ConceptForMaskedLM
from .backbone import KEPT, fill, open_backbone, with_layers
from .data.corpus import Corpus
from .initialize import initialize
from .launching.launch import World
from .recipe.schema import Recipe


class Beginning(NamedTuple):
    model: ConceptForMaskedLM
    origin: str  # where the first weights came from, for people; empty: drawn
    files: dict[str, str]  # small files for the run's folder, by name


def begin(recipe: Recipe, corpus: Corpus, world: World, is_new: bool = True) -> Beginning:
    """Builds the model from torch's generator, and fills it from `model.backbone` and `init`. Collective.

    Args:
        is_new: no checkpoint will fill it.

    Raises:
        InputError: the backbone or the source of `init` cannot be used, or does not fit.
    """
    tokens, tokenizer, origin, files = corpus.tokens, corpus.tokenizer, "", {}
    backbone, of_backbone = open_backbone(recipe, tokenizer, world, None if is_new else recipe.path / KEPT), {}
    if backbone:
        backbone = with_layers(backbone, recipe, corpus)
        of_backbone = {"backbone": backbone.described}
        if backbone.layers:
            of_backbone["backbone_layers"] = backbone.layers
    model = ConceptForMaskedLM(recipe.build_config(
        vocab_size=backbone.vocab_size(tokens) if backbone else tokens.vocab_size, mask_token_id=tokens.mask_id,
        pad_token_id=tokenizer.pad_token_id, **of_backbone,
    ))  # fmt: skip
    if backbone and backbone.folder:
        origin = fill(model, backbone, corpus)
        files[KEPT] = backbone.kept
    if recipe.init and is_new:
        origin = f"from {recipe.init.source}: {initialize(model, recipe.init, tokenizer, world)}"
    if origin:
        files["initialization.txt"] = origin
    if recipe.init and recipe.init.embeddings == "frozen":
        model.encoder.embed_tokens.weight.requires_grad_(False)
    return Beginning(model, origin, files)
