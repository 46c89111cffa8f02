"""What does not fit together in a recipe, although each field by itself is right."""

from collections.abc import Iterator

from ...models.regularizers import WITHIN_TEXT
from ...models.sharding import halo
from ...models.token_source import check_keep
from ..data.concepts import largest
from ..data.pydocs import NAMES as PYDOCS
from ..errors import InputError
from .finetune import Finetune
from .schema import Recipe

SHORTEST_SPAN = 3  # tokens, of the uniform ones
WHOLE = ("read_back",)  # objectives whose encoder reads the text as it is
TIMED = ("diffusion", "prefix_diffusion")  # objectives that have a time


def conflicts(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(dotted field, what is wrong with it and what to do) of each conflict."""
    yield from of_objective(recipe)
    yield from of_contrastive(recipe)
    yield from of_distill(recipe)
    yield from of_regularization(recipe)
    yield from of_stages(recipe)
    yield from of_concepts(recipe)
    yield from of_states(recipe)
    yield from of_stream(recipe)
    yield from of_profile(recipe)
    yield from of_speed(recipe)
    yield from of_sequence_ranks(recipe)
    yield from of_best(recipe)
    yield from of_model(recipe)


def of_objective(recipe: Recipe) -> Iterator[tuple[str, str]]:
    model, parts = recipe.model, recipe.parts()
    mixing = model.get("decoder_mixing", "none")
    if len({part["hidden"] for _, part in parts if "hidden" in part}) > 1:
        yield "objective.parts", "some parts have hidden = 'drop' and some 'mask'; a model hides tokens in one way"
    shortest = min(window for _, window in recipe.stages())
    for field, part in parts:
        is_span = part.get("masking") == "span" and part["span"] == "uniform"
        if is_span and part["probability"] * shortest < SHORTEST_SPAN:
            yield f"{field}.masking", (
                f"span, but {part['probability']:g} of a window of {shortest} tokens is less than the shortest span, "
                f"{SHORTEST_SPAN}; use longer windows, or masking = random"
            )
        name, hidden = part["name"], part.get("hidden")
        if hidden and model.get("hidden_tokens", hidden) != hidden:
            found = model["hidden_tokens"]
            problem = f"{found!r} does not fit {field}.hidden, which is {hidden!r}; leave it out, and it follows"
            yield "model.hidden_tokens", problem
        if model.get("timestep_conditioning") and name not in TIMED:
            yield "model.timestep_conditioning", f"objective {name} has no timesteps; set it to false"
        if part.get("states"):
            if len(parts) > 1:
                yield f"{field}.states", "expected 0 in a mixture: only a read_back by itself reads states"
            elif model.get("backbone") is None or model.get("backbone_train", "none") != "none":
                yield f"{field}.states", "expected 0 without a frozen model.backbone, whose states are read back"
        if part.get("context", mixing != "none") != (mixing != "none"):
            expected, why = "true", "what is known must take part in training as it does in use"
            if mixing == "none":
                expected, why = "false", "no row would see it"
            yield f"{field}.context", f"expected {expected} with model.decoder_mixing = {mixing}: {why}"
    if not recipe.has_task and recipe.contrastive is None and recipe.distill is None:
        yield "objective.name", "none, and no contrastive or distill section: there is nothing to train"


def of_contrastive(recipe: Recipe) -> Iterator[tuple[str, str]]:
    term = recipe.build_contrastive()
    if term is None:
        return
    if term.pairs == "dropout" and not recipe.model.get("dropout"):
        yield "contrastive.pairs", "dropout, but model.dropout is 0: the two views would be the same; set model.dropout"
    if term.start and not recipe.has_task:
        yield "contrastive.start", f"expected 0 with objective none, got {term.start:g}: nothing else is trained"
    field = "batch.tokens" if term.negatives == "step" else "batch.micro_tokens"
    yield from room_for_two(recipe, field, "a contrastive loss")


def of_distill(recipe: Recipe) -> Iterator[tuple[str, str]]:
    options = recipe.build_distill()
    if options is None:
        return
    num_concepts = recipe.most_concepts
    if options.num_stretches and num_concepts % options.num_stretches:
        yield "distill.stretches", f"expected a divisor of model.num_concepts = {num_concepts}, got {options.stretches}"
    for name in ("similarity", "contrast"):
        if getattr(options, name) > 0:
            yield from room_for_two(recipe, "batch.micro_tokens", f"distill.{name}, which compares texts")


def of_states(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.data.states_gb is None:
        return
    if recipe.model.get("backbone") is None or recipe.model.get("backbone_train", "none") != "none":
        yield "data.states_gb", "expected nothing without a frozen model.backbone: states change as it is trained"
    elif recipe.distill is None and not any(part["name"] in WHOLE for _, part in recipe.parts()):
        name = recipe.objective["name"]
        yield "data.states_gb", f"expected nothing with objective {name}, which never reads a window whole"


def of_stream(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """What asks for all of the text is not to be had of one that is read piece by piece."""
    data = recipe.data
    if data.stream_mb is None:
        return
    if data.dedup:
        yield "data.dedup", "expected false with data.stream_mb, which never sees all of the text"
    if data.states_gb is not None:
        yield "data.states_gb", "expected nothing with data.stream_mb, of which nothing is kept"
    if recipe.distill is not None:
        yield "data.stream_mb", "expected nothing with distill, whose teacher embeds all windows ahead of the run"
    if recipe.needs_phrases:
        yield "data.stream_mb", "expected nothing where objective.phrases are to be counted; give the file of a list"
    if any(source.max_documents is not None for source in data.sources()):
        yield "data.max_documents", "expected nothing with data.stream_mb, which reads on and on"
    if any(source.on_unreadable == "skip" for source in data.sources()):
        yield "data.on_unreadable", "expected stop with data.stream_mb: where it goes on must not change"
    if any(source.path in PYDOCS for source in data.sources()):
        yield "data.stream_mb", f"expected nothing with pydocs, which is small, got {data.stream_mb:g}"


def of_regularization(recipe: Recipe) -> Iterator[tuple[str, str]]:
    terms = recipe.build_regularization()
    if terms is None:
        return
    if recipe.model.get("num_concepts") == 1 and set(terms.terms) & set(WITHIN_TEXT):
        yield "regularization.terms", "concepts of a text are compared with each other, but model.num_concepts is 1"
    over_batch = [name for name in terms.terms if name not in WITHIN_TEXT]
    if over_batch or terms.dynamic:
        name = over_batch[0] if over_batch else "regularization.dynamic"
        yield from room_for_two(recipe, "batch.micro_tokens", f"{name}, which looks at differences between texts")


def room_for_two(recipe: Recipe, field: str, what: str) -> Iterator[tuple[str, str]]:
    """A population of one says nothing."""
    section, name = field.split(".")
    given, needed = getattr(getattr(recipe, section), name), 2 * recipe.data.window
    if given * (recipe.train.sequence_ranks if name == "micro_tokens" else 1) < needed:
        yield field, f"expected at least {needed}, two windows of data.window, for {what}; got {given}"


def of_profile(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.profile.steps is None:
        return
    first, last = recipe.profile.steps
    if not first <= last <= recipe.train.steps:
        expected = f"first and last step, at most train.steps = {recipe.train.steps}"
        yield "profile.steps", f"expected {expected}, got [{first}, {last}]"


def of_speed(recipe: Recipe | Finetune) -> Iterator[tuple[str, str]]:
    train, offload, stage = recipe.train, recipe.zero.offload, recipe.zero.stage
    if train.compile and train.keep in ("states", "ids"):
        yield "train.keep", f"expected keys or nothing with train.compile, got {train.keep!r}"
    if train.compile and train.tokens_per_concept is not None:
        yield "train.compile", "expected false with train.tokens_per_concept: each number of concepts has its own graph"
    if train.compile and train.sequence_ranks > 1:
        yield "train.compile", "expected false with train.sequence_ranks > 1: ranks meet inside of layers"
    if offload == "parameters" and stage != 3:
        yield "zero.offload", f"expected optimizer with zero.stage = {stage}: only stage 3 lets go of parameters"
    if offload is not None and recipe.optim.muon is not None:
        yield "zero.offload", "expected nothing with optim.muon, which multiplies matrices in every update"
    if train.on_spike in ("skip", "rewind") and recipe.optim.muon is not None:
        yield "train.on_spike", f"expected ignore or warn with optim.muon, which cannot undo, got {train.on_spike!r}"


def of_sequence_ranks(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """What is not divided over ranks that share a text."""
    ranks, model = recipe.train.sequence_ranks, recipe.model
    if ranks == 1:
        return
    with_ranks = f"with train.sequence_ranks = {ranks}"
    for section in ("contrastive", "distill"):
        if getattr(recipe, section) is not None:
            yield section, f"expected none {with_ranks}: it reads texts of its own, which are not divided"
    mixing = model.get("decoder_mixing", "none")
    if mixing != "none":
        yield "model.decoder_mixing", f"expected none {with_ranks}, got {mixing}: rows of other ranks are not seen"
    if model.get("dropout") and model.get("num_token_layers"):
        yield "model.dropout", f"expected 0 {with_ranks} and token layers, whose draws differ from rank to rank"
    if recipe.train.keep in ("states", "ids"):
        yield "train.keep", f"expected keys or nothing {with_ranks}, got {recipe.train.keep!r}"
    if model.get("backbone") is not None:
        yield "model.backbone", f"expected none {with_ranks}: its windows are not divided"
        return
    try:
        halo(recipe.build_config())
    except ValueError as error:
        field, _, problem = str(error).partition(": ")
        yield f"model.{field}", f"{problem}, or train.sequence_ranks = 1"
    except InputError:
        return  # a fault of the model by itself, which ``of_model`` names


def of_task(recipe: Finetune) -> Iterator[tuple[str, str]]:
    """Conflicts of a recipe that learns a task."""
    yield from of_best(recipe)
    yield from of_speed(recipe)
    if recipe.train.sequence_ranks > 1:
        found = recipe.train.sequence_ranks
        yield "train.sequence_ranks", f"expected 1 where a task is learned, whose texts are not divided, got {found}"


def of_best(recipe: Recipe | Finetune) -> Iterator[tuple[str, str]]:
    """Whether evaluations of this run have the figure by which the best is kept."""
    metric = recipe.checkpoint.keep_best
    if metric is None:
        return
    if isinstance(recipe, Finetune):
        there = {"loss", "accuracy", "pearson"}
    else:
        there = {"loss", "nll_unseen", "nll_seen"} if recipe.has_task else set()
        there |= {"contrastive", "retrieval"} if recipe.contrastive is not None else set()
        there |= {"alignment", "alignment_of_stretches"} if recipe.distill is not None else set()
        there |= {"state_error"} if any(part.get("states") for _, part in recipe.parts()) else set()
    if metric not in there:
        yield "checkpoint.keep_best", f"expected one of {', '.join(sorted(there))}, which this run has, got {metric!r}"
    if not recipe.eval.every:
        yield "checkpoint.keep_best", f"expected nothing with eval.every = 0, which leaves no choice, got {metric!r}"


def of_stages(recipe: Recipe) -> Iterator[tuple[str, str]]:
    before, steps, window = recipe.train.stages, recipe.train.steps, recipe.data.window
    starts = [0, *(stage.until for stage in before), steps]
    windows = [*(stage.window for stage in before), window]
    for i, stage in enumerate(before):
        if not starts[i] < stage.until < steps:
            yield f"train.stages.{i}.until", (
                f"expected a step after {starts[i]} and before train.steps = {steps}, got {stage.until}"
            )
        if windows[i + 1] <= stage.window:
            what = "the window of the next stage" if i + 1 < len(before) else "data.window, with which the run ends"
            yield f"train.stages.{i}.window", f"expected less than {windows[i + 1]}, {what}, got {stage.window}"


def of_concepts(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """What numbers of concepts other than model.num_concepts ask for."""
    most, ratios, stages = recipe.most_concepts, recipe.train.tokens_per_concept, recipe.train.stages
    counts = [stage.num_concepts for stage in stages]
    if ratios is None and not any(counts):
        return
    if most == 1:
        yield "model.num_concepts", "expected at least 2, from which other numbers are made, got 1"
    distill, contrastive = recipe.build_distill(), recipe.build_contrastive()
    num_stretches = distill.num_stretches if distill else 0
    if ratios is not None:
        needed = largest([window for _, window in recipe.stages()], ratios)
        if needed > most:
            yield "train.tokens_per_concept", (
                f"{min(ratios):g} asks for {needed} concepts of a window of {recipe.data.window} tokens, and "
                f"model.num_concepts is {most}; raise that or this"
            )
        if any(counts):
            yield "train.stages", "expected no num_concepts beside train.tokens_per_concept, which decides them"
        if num_stretches:
            yield "train.tokens_per_concept", "expected nothing with distill.stretch, whose S must divide every C"
        if contrastive is not None and contrastive.similarity == "slots":
            yield "train.tokens_per_concept", "expected nothing with contrastive.similarity = slots: C must be the same"
    filled = [count or most for count in counts] + [most]
    for i, stage in enumerate(stages):
        field, count, following = f"train.stages.{i}.num_concepts", filled[i], filled[i + 1]
        if stage.num_concepts and count > min(stage.window, most):
            limit = "model.num_concepts" if most <= stage.window else "the window of this stage"
            yield field, f"expected at most {min(stage.window, most)}, {limit}, got {count}"
        elif count > following:
            yield field, f"expected at most the {following} of the next stage, got {count}: it can only grow"
        if num_stretches and count % num_stretches:
            yield field, f"expected a multiple of distill.stretches = {num_stretches}, got {count}"


def of_model(recipe: Recipe) -> Iterator[tuple[str, str]]:
    try:
        config = recipe.build_config(backbone=None)
    except InputError as error:
        field, _, problem = str(error).removeprefix("model: ").partition(": ")
        yield f"model.{field}", problem
        return
    try:
        check_keep(config, recipe.train.keep)
    except ValueError as error:
        yield "train.keep", str(error).removeprefix("keep: ")
    if recipe.zero.stage == 3 and recipe.train.keep in ("states", "ids"):
        yield "train.keep", f"expected keys or nothing with zero.stage = 3, got {recipe.train.keep!r}"
    halvings, shortest = len(config.funnel or ()), min(window for _, window in recipe.stages())
    if 2**halvings > shortest:
        yield "model.funnel", f"{halvings} halvings leave no two tokens of a window of {shortest} apart; use fewer"
    longest = config.max_position_embeddings
    if config.token_positions == "learned" and recipe.data.window > longest:
        yield "data.window", f"expected at most model.max_position_embeddings = {longest} with learned positions"
