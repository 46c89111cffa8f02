"""The model card of an exported folder: what to install, how to load it, what it comes from, what it scored."""

import json
from dataclasses import dataclass, field
from typing import Any

import yaml
from torch import nn

from .. import __version__
from ..models.masked_lm import ConceptForMaskedLM
from .files import in_words
from .recipe.reader import dump

INSTALL = f"the Python package conceptron, version {__version__} or newer, beside transformers; there is no code here"


@dataclass(frozen=True)
class About:
    """What a folder should say of its model beside its configuration."""

    name: str
    length: int  # tokens of the longest text in training
    recipe: dict[str, Any] = field(default_factory=dict)  # resolved
    data: list[str] = field(default_factory=list)  # one line a source
    figures: dict[str, Any] = field(default_factory=dict)  # of the last evaluation on held-out text
    is_trained: bool = True  # else: as the recipe starts


def card(model: nn.Module, about: About) -> str:
    """Markdown with a head in YAML, as the hub reads it."""
    return "\n".join([head(model), f"# {about.name}", "", *needs(), *loading(model), *origin(model, about),
                      *scores(about), *recipe(about)])  # fmt: skip


def peer_card(model: nn.Module, about: About) -> str:
    """The same of a fine-tuned model of transformers, which needs nothing of this package."""
    fields = {"library_name": "transformers", "tags": ["conceptron"], "pipeline_tag": "text-classification"}
    millions, note = sum(p.numel() for p in model.parameters()) / 1e6, model.config.conceptron_task
    scale, offset = (in_words(note[name], ".7g") for name in ("label_scale", "label_offset"))
    lines = [
        "```python", "from transformers import AutoModelForSequenceClassification, AutoTokenizer", "",
        "model, tokenizer = (auto.from_pretrained(FOLDER) for auto in (AutoModelForSequenceClassification, "
        "AutoTokenizer))",
        'logits = model(**tokenizer("A question.", "A document.", return_tensors="pt")).logits', "```", "",
        f"- {millions:.1f} M parameters, a {model.config.model_type} fine-tuned on {note['name']}",
        f"- question and document are read together, up to {note['max_tokens']} tokens",
    ]  # fmt: skip
    if model.config.problem_type == "regression":
        lines.append(f"- a value is {scale} times the logit, plus {offset}")
    lines += [f"- data: {line}" for line in about.data]
    lines += ["- licence of the data, and of these weights: not recorded by the run", ""]
    front = f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n"
    return "\n".join([front, f"# {about.name}", "", *lines, *scores(about), *recipe(about)])


def head(model: nn.Module) -> str:
    config, fields = model.config, {"library_name": "transformers", "tags": ["conceptron", "sentence-transformers"]}
    fields["pipeline_tag"] = "feature-extraction"
    if config.backbone and config.backbone.get("license"):
        fields["license"] = config.backbone["license"]
    bases = [name for name in ((config.backbone or {}).get("name"), distilled_from(config)) if name]
    return f"---\n{yaml.safe_dump(fields | ({'base_model': bases} if bases else {}), sort_keys=False)}---\n"


def needs() -> list[str]:
    return [f"Needs {INSTALL}. Install the package first, then `import conceptron` before the folder is loaded.", ""]


def loading(model: nn.Module) -> list[str]:
    auto = "AutoModelForMaskedLM" if isinstance(model, ConceptForMaskedLM) else "AutoModel"
    return [
        "```python",
        "import conceptron                       # transformers then knows the model",
        f"from transformers import AutoModel, {auto}, AutoTokenizer" if auto != "AutoModel" else
        "from transformers import AutoModel, AutoTokenizer",
        "",
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER)",
        'batch = tokenizer(["A text."], return_tensors="pt")',
        "encoded = AutoModel.from_pretrained(FOLDER)(**batch)   # last_hidden_state [B, C, d], pooler_output [B, d]",
        "",
        "from sentence_transformers import SentenceTransformer  # if it is installed",
        'vectors = SentenceTransformer(FOLDER).encode(["A text."])',
        "```",
        "",
        "A text is read as it stands, without special tokens around it; a pair is the first text, a separator, the "
        "second. The tokenizer of this folder does both.",
        "",
    ]  # fmt: skip


def origin(model: nn.Module, about: About) -> list[str]:
    config = model.config
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    lines = [
        f"- {millions:.1f} M parameters; {config.num_concepts} concepts of width {config.hidden_size} a text",
        f"- trained on texts of up to {about.length} tokens" if about.is_trained else
        "- nothing is trained: this is how the recipe below starts",
    ]
    if config.backbone:
        own = config.backbone
        lines.append(
            f"- backbone: {own['name']}, licence {own.get('license') or 'not stated'}, revision "
            f"{own.get('revision') or 'not known'}, sha256 {own['sha256']}"
        )
    if distilled_from(config):
        lines.append(f"- distilled from {distilled_from(config)}")
    if about.is_trained:
        lines += [f"- data: {line}" for line in about.data]
        lines.append("- licence of the data, and of these weights: not recorded by the run")
    return [*lines, ""]


def distilled_from(config: Any) -> str | None:
    return (getattr(config, "distilled_from", None) or {}).get("teacher")


def scores(about: About) -> list[str]:
    if not about.is_trained:
        return []
    rows = {name: value for name, value in about.figures.items() if isinstance(value, int | float)}
    if not rows:
        return ["No held-out figures were measured in the run.", ""]
    table = [f"| {name} | {in_words(value, '.5g')} |" for name, value in rows.items()]
    return ["Held-out text, end of the run (nats a token unless named otherwise):", "", "| figure | value |",
            "|---|---:|", *table, ""]  # fmt: skip


def recipe(about: About) -> list[str]:
    if not about.recipe:
        return []
    plain = json.loads(json.dumps(about.recipe, default=str, allow_nan=False))
    return ["Recipe (`conceptron train` runs it):", "", "```yaml", dump(plain).strip(),
            "```", ""]  # fmt: skip
