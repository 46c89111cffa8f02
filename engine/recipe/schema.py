"""The schema of a recipe: one YAML file describes a run, every field has a type and a default.

A mistake ends in one `InputError` that names the file (or the override), the dotted field, what is wrong and, for an
unknown key, the nearest valid one.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from ...models.config import ConceptConfig
from ...models.objectives import OBJECTIVES, Distill, Mixed, NoTask
from ...models.pretraining import ContrastiveTerm
from ...models.ranges import below, number, or_nothing, whole
from ...models.regularizers import Regularization
from ..checkpoints.retention import METRICS
from ..data.concepts import Drawn, Fixed
from ..errors import InputError
from . import kinds
from .data import DataRecipe, Window
from .kinds import (
    Count,
    CountOrZero,
    Folder,
    Name,
    NameOrNothing,
    NotNegative,
    Positive,
    PositiveOrZero,
    Seed,
    Share,
    Switch,
    kind,
)  # fmt: skip
from .reader import one_line

# What may change between an interruption and its resumption: it moves no data and no weight, or only by rounding.
FREE = (
    "run.name", "run.folder", "run.hang_minutes", "run.join_minutes", "resume", "eval.", "checkpoint.", "logging.",
    "profile.", "zero.", "ema.", "batch.micro_tokens", "data.cache", "data.processes", "data.states_gb",
    "data.on_unreadable", "task.cache", "distill.max_gib", "train.keep", "train.recompute", "train.compile",
    "train.on_collapse", "train.sequence_ranks",
    "train.on_spike", "train.spike_",  # a run that diverges may need these
)  # fmt: skip


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)


class Run(Section):
    """Where the run lives, and the seed of everything random in it."""

    name: Name = ""  # the folder's name; empty: the recipe file's name
    folder: Folder = "runs"
    seed: Seed = 0
    hang_minutes: kind(float, number(0.01, 30 * 24 * 60)) = 30.0  # without a step, of several ranks: `watch.py`
    join_minutes: kind(float, number(0.01, 24 * 60)) = 10.0  # how long a rank waits for the others at the start


class Muon(Section):
    """Of the matrices of layers; embeddings, heads, norms and biases keep AdamW, and `weight_decay` is for both."""

    lr: Positive = 0.02  # the highest; it follows the schedule of `optim.lr`
    momentum: Share = 0.95


class Optim(Section):
    """AdamW; a linear warm-up, then down to `min_lr_ratio * lr` at the last step: by a cosine all the way, or ("wsd")
    in the last `decay` of the steps."""

    lr: Positive = 3e-4
    betas: tuple[Share, Share] = (0.9, 0.98)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.01
    clip: PositiveOrZero = 1.0  # largest norm of the whole gradient, or of AdamW's beside Muon; 0: no clipping
    muon: Muon | None = None  # a section, which may be empty, gives the matrices of layers to it
    warmup_steps: CountOrZero = 0
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay: kind(float, number(0, 1)) = 0.2
    min_lr_ratio: kind(float, number(0, 1)) = 0.1


class Batch(Section):
    """Sizes in tokens. A step's batch does not depend on the number of ranks or on `micro_tokens`."""

    tokens: Count = 65536  # of one optimizer step, all ranks together
    micro_tokens: Count = 16384  # of one forward and backward pass on one rank
    by_length: Switch = False  # the windows of a step are dealt so that those of a micro-batch are about as long


class Stage(Section):
    """Steps with shorter windows than `data.window`."""

    until: Count  # the step, counted from 0, with which the next stage begins
    window: Window
    num_concepts: kind(int | None, or_nothing(whole())) = None  # C of these steps; left out: model.num_concepts


class Train(Section):
    steps: Count
    stages: list[Stage] = []  # what comes before the last stage, whose windows are `data.window`, as in evaluation
    # r: C = N / r concepts, rounded up, for the longest text, of N tokens, of a micro-batch; of several every step
    # draws one. Left out: model.num_concepts, or the C of a stage
    tokens_per_concept: list[kind(float, number(1))] | None = Field(None, min_length=1)
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # bf16: autocast; weights, gradients and moments stay float32;
    # auto: what pays on the machine where the run begins, written into it (`precision.py`)
    label_smoothing: Share = 0.0
    checkpoint_backbone: Switch = False  # what is trained of model.backbone keeps no activations: less memory
    keep: Literal["keys", "states", "ids"] | None = None  # of a token, for the backward pass: `ConceptEncoder.keep`
    recompute: Switch = False  # gradient checkpointing: layers are computed once more in the backward pass
    compile: Switch = False  # torch.compile of layers and decoder in training: once, for every length
    sequence_ranks: Count = 1  # that share each text; a pass then has batch.micro_tokens for each of them
    max_bad_steps: Count = 5  # consecutive steps with a non-finite gradient after which the run stops
    on_collapse: Literal["warn", "stop"] = "warn"  # where an evaluation finds that concepts carry next to no content
    on_spike: Literal["ignore", "warn", "skip", "rewind"] = "warn"  # where a step's loss or gradient norm is an outlier
    spike_window: kind(int, whole(8, 10000)) = 128  # steps that it is compared with, and: `spikes.py`
    spike_deviations: kind(float, number(1, 1000)) = 10.0  # how many standard deviations above their mean are too many


class Zero(Section):
    stage: kind(int, whole(1, 3)) = 1  # 0 is not offered: DeepSpeed would not skip a NaN gradient there
    offload: Literal["optimizer", "parameters"] | None = None  # to the host's memory: moments, float32 weights and the
    # update itself; "parameters": the weights, too, which are fetched layer by layer (stage 3)


class Ema(Section):
    """Averages of the weights, which are better than the last ones where the learning rate has not come down."""

    decay: kind(float | None, or_nothing(below(1))) = None  # what the average keeps of itself a step, such as 0.999
    use: Switch = True  # in evaluations and in the model folder; false: in checkpoints only, for `export --average`


class Eval(Section):
    every: CountOrZero = 500  # steps; 0: only after the last step
    tokens: Count = 65536  # held-out tokens of one evaluation


class Init(Section):
    """Where the first weights come from, if they are not drawn. A resumed run has its own."""

    source: kinds.Path  # a folder or a hub id of a model of this package; `model.backbone` takes others
    layer: CountOrZero = 0  # which becomes the tied one, where the source's are not tied
    embeddings: Literal["frozen", "trained"] | None = None  # take the word embeddings and nothing else, of any encoder


class Checkpoint(Section):
    """Those that stay are the newest, and what `keep_every` and `keep_best` name."""

    every: CountOrZero = 500  # steps; 0: only after the last step
    async_: Switch = Field(True, alias="async")  # written beside training, from a copy in memory
    keep_last: Count = 2  # the newest
    keep_every: CountOrZero = 0  # those of steps that are multiples of it; 0: none
    keep_best: Literal[METRICS] | None = None  # that of the best evaluation, saved right after it: best.json names it


class Logging(Section):
    """Where figures go besides metrics.jsonl, TensorBoard and the terminal."""

    wandb: NameOrNothing = None  # a project of Weights & Biases


class Profile(Section):
    """Steps of which a trace and a table are left in RUN/profile, and on a GPU, of whose allocator it is, a snapshot of
    memory."""

    steps: kinds.Span | None = None  # first and last, counted from 1: 10-12, or [10, 12]


class Training(Section):
    """What every run has, whatever it learns."""

    run: Run = Run()
    optim: Optim = Optim()
    batch: Batch = Batch()
    train: Train
    zero: Zero = Zero()
    ema: Ema = Ema()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()
    profile: Profile = Profile()
    resume: Literal["never", "auto"] = "never"

    @property
    def path(self) -> Path:
        """The run's folder."""
        return Path(self.run.folder).expanduser() / self.run.name

    def with_precision(self, precision: str) -> Self:
        return self.model_copy(update={"train": self.train.model_copy(update={"precision": precision})})

    def resolved(self) -> dict[str, Any]:
        """Every field with its value, as plain YAML types."""
        return self.model_dump(mode="json")

    def trajectory(self) -> dict[str, Any]:
        """Dotted field -> value, of the fields that decide the loss sequence."""
        flat = flatten(self.resolved())
        return {key: value for key, value in flat.items() if not key.startswith(FREE)}


class Recipe(Training):
    """One run. `model`, `objective`, `contrastive`, `distill` and `regularization` are checked against the options of
    what they describe: `ConceptConfig`, the objective of that name, `ContrastiveTerm`, `Distill`, `Regularization`.

    `objective` has the name of one in `OBJECTIVES` and its options; or `name: mixed` and `parts`, a list of such
    sections with a `weight` each (1 if it is left out), of which every step takes one; or `name: none`.
    """

    model: dict[str, Any] = {}
    data: DataRecipe
    objective: dict[str, Any]
    contrastive: dict[str, Any] | None = None  # a section, which may be empty, adds it
    distill: dict[str, Any] | None = None
    regularization: dict[str, Any] | None = None
    init: Init | None = None

    @property
    def has_task(self) -> bool:
        return self.objective["name"] != "none"

    def parts(self) -> list[tuple[str, dict[str, Any]]]:
        """(dotted field, section) of each objective: one, or the parts of a mixture."""
        if self.objective["name"] != "mixed":
            return [("objective", self.objective)]
        return [(f"objective.parts.{i}", part) for i, part in enumerate(self.objective["parts"])]

    def build_objective(self) -> Any:
        """One of the frozen dataclasses in `OBJECTIVES`, a `Mixed` of several, or `NoTask`."""
        if not self.has_task:
            return NoTask()
        sections = [section for _, section in self.parts()]
        if self.needs_phrases:
            raise InputError("objective.phrases: they are counted when training begins; give the file of a list here")
        objectives = [
            OBJECTIVES[section["name"]](**{key: section[key] for key in section if key not in ("name", "weight")})
            for section in sections
        ]
        if len(objectives) == 1:
            return objectives[0]
        names = [section["name"] for section in sections]
        numbered = [f"{name}-{i}" if names.count(name) > 1 else name for i, name in enumerate(names)]
        return Mixed(tuple(objectives), tuple(section["weight"] for section in sections), tuple(numbered))

    @property
    def needs_phrases(self) -> bool:
        """Whether phrases are to be masked that are yet to be counted in the training text."""
        return any(part.get("masking") == "pmi" and part["phrases"] is None for _, part in self.parts())

    def with_phrases(self, file: Path) -> "Recipe":
        def fill(section: dict[str, Any]) -> dict[str, Any]:
            is_empty = section.get("masking") == "pmi" and section["phrases"] is None
            return {**section, "phrases": str(file)} if is_empty else section

        objective = fill(self.objective)
        if "parts" in objective:
            objective = {**objective, "parts": [fill(part) for part in objective["parts"]]}
        return self.model_copy(update={"objective": objective})

    def build_contrastive(self) -> ContrastiveTerm | None:
        return None if self.contrastive is None else ContrastiveTerm(**self.contrastive)

    def build_distill(self) -> Distill | None:
        return None if self.distill is None else Distill(**self.distill)

    def build_regularization(self) -> Regularization | None:
        return None if self.regularization is None else Regularization(**self.regularization)

    @property
    def most_concepts(self) -> int:
        return self.model.get("num_concepts", ConceptConfig().num_concepts)

    def stages(self) -> list[tuple[int, int]]:
        """(first step, window) of each stage."""
        before = self.train.stages
        starts = [0, *(stage.until for stage in before)]
        return list(zip(starts, [*(stage.window for stage in before), self.data.window], strict=True))

    def concepts(self) -> list[Drawn | Fixed | None]:
        """How many concepts the texts of each stage are read into; None: model.num_concepts."""
        before = self.train.stages
        if ratios := self.train.tokens_per_concept:
            return [Drawn(tuple(ratios), self.most_concepts, self.run.seed)] * (len(before) + 1)
        return [stage.num_concepts and Fixed(stage.num_concepts) for stage in before] + [None]

    def populations(self, num_micro_batches: int) -> dict[str, int]:
        """What else decides the loss sequence where a loss looks at one micro-batch as a whole.

        Args:
            num_micro_batches: of a step, over all ranks.
        """
        contrastive, regularization = self.build_contrastive(), self.build_regularization()
        is_whole = contrastive is not None and (contrastive.negatives == "micro_batch" or not contrastive.across_ranks)
        is_whole |= self.distill is not None and self.distill["similarity"] + self.distill["contrast"] > 0
        is_whole |= regularization is not None and regularization.depends_on_batch
        is_whole |= self.train.tokens_per_concept is not None  # C follows the longest text of a micro-batch
        return {"micro-batches of a step": num_micro_batches} if is_whole else {}

    def build_config(self, **from_tokenizer: Any) -> ConceptConfig:
        """The model's config; vocabulary size and special ids come from the tokenizer, `backbone` from
        `backbone.open_backbone` (None: not opened yet, and nothing is checked that only it can tell).

        `hidden_tokens` follows `hidden` of the objective, so that the finished model hides tokens as it was taught.

        Raises:
            InputError: the fields do not fit together.
        """
        hidden = next((part["hidden"] for _, part in self.parts() if "hidden" in part), None)
        hidden = hidden or self.model.get("hidden_tokens", "drop")
        fields = {**self.model, "hidden_tokens": hidden, **from_tokenizer}
        if self.model.get("backbone") is not None:
            if "backbone" not in from_tokenizer:
                raise InputError("model.backbone: this command knows the cost of our own layers only; train runs it")
            if fields["backbone"] is None:
                fields = {name: value for name, value in fields.items() if not name.startswith("backbone")}
                fields |= {"init_queries": "segment", "token_dim": None}
        try:
            return ConceptConfig(**fields)
        except (ValueError, TypeError) as error:
            raise InputError(f"model: {one_line(error)}") from error


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
