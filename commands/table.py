"""Every command: what it says of itself, what runs it, its options, and the range of each.

Nothing heavy is imported in this room: help and every wrong option are answered before torch is. What a command can
only know with its file or model open (a row of a table, a field of a recipe) it checks itself, as an ``InputError``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .ranges import Kind, Number, Place, Text, Whole, Word, Words


@dataclass(frozen=True)
class Option:
    """One argument of a command.

    name: ``--name``, or ``name`` for what is given by its place.
    kind: its range; ``None``: a flag.
    count: "1"; "?" and "*" for what may be left out, "+" and "*" for several.
    either: one of the options with the same word must be given, and only one.
    """

    name: str
    kind: Kind | None
    says: str
    default: Any = None
    count: str = "1"
    shown: str | None = None
    required: bool = False
    either: str | None = None

    @property
    def key(self) -> str:
        return self.name.removeprefix("--").replace("-", "_")


@dataclass(frozen=True)
class Command:
    """``words`` as they are typed; ``runs``: "module:function", called with the options, returns the exit code."""

    words: str
    says: str
    example: str
    runs: str
    options: tuple[Option, ...] = ()


SEED = Whole(0, 2**63 - 1)
RECIPE = Option("recipe", Text("a recipe"), "a YAML file, or the name of a shipped one such as pretrain/mlm.yaml")
OVERRIDES = Option("overrides", Text("section.field=value"), "what to change in it", (), "*", "section.field=value")
DEVICE = Option("--device", Word(("cpu", "cuda")), "left out: a GPU where there is one")
RESUME = Option("--resume", None, "keep what --out holds already")
VOCABULARY = Option("--vocabulary", Whole(8, 2**24), "number of ids, where the recipe's tokenizer cannot be opened",
                    shown="V")  # fmt: skip
MODEL = Option("--model", Text("a model"), "a folder of this package, a finished run, or a hub id", required=True)
TEXT_COLUMN = Option("--text-column", Text("a column"), "of jsonl and parquet files", "text")
MINUTES = Number(0, 1e5)
WIDTHS = (
    Option("--width", Whole(1, 65536), "d, of every encoder", 128),
    Option("--layers", Whole(1, 1024), "of every encoder", 3),
    Option("--heads", Whole(1, 1024), "of every layer; width is a multiple of it", 2),
)
TOKENS = Whole(1, 2**26)
OPERATORS = ("concept_attention", "bixt_attention", "slot_attention", "token_attention", "adaln",
             "linear_cross_entropy")  # fmt: skip
PROVIDERS = (
    "conceptron", "conceptron (torch)", "eager", "torch.compile", "SDPA flash", "SDPA cuDNN", "SDPA efficient",
    "SDPA math", "FlexAttention", "flash_attn 2", "flash_attn 3", "Liger", "CCE", "CCE exact",
    "F.linear_cross_entropy",
)  # fmt: skip

ARCHITECTURES = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942", "gfx950")


def out(folder: str, says: str = "where the results go") -> Option:
    return Option("--out", Place("new folder"), says, Path(folder))


COMMANDS = (
    Command(
        "train", "run a recipe: one process, or one of several under a launcher",
        "conceptron train pretrain/diffusion.yaml optim.lr=2e-4 batch.tokens=131072", "engine.trainer:main",
        (RECIPE, OVERRIDES),
    ),
    Command(
        "doctor", "whether this machine can train, and what to mend where it cannot",
        "conceptron doctor pretrain/diffusion.yaml", "engine.doctor:main",
        (Option("recipe", Text("a recipe"), "also what this one needs: folder, tokenizer", None, "?"), OVERRIDES),
    ),
    Command(
        "prepare", "make what a recipe reads ahead of the run: tokens, what a teacher says of them, states of a task",
        "conceptron prepare pretrain/mlm.yaml data.cache=/shared/cache", "engine.prepare:main", (RECIPE, OVERRIDES),
    ),
    Command(
        "export", "a model folder from a checkpoint of a run, also of one that is still training",
        "conceptron export runs/demo --step 1200", "engine.jobs.export:main",
        (
            Option("run", Place("folder"), "runs/NAME"),
            Option("--step", Whole(0), "of the checkpoint; left out: the newest"),
            Option("--best", None, "that of the best evaluation, which checkpoint.keep_best has kept"),
            Option("--average", None, "the weights averaged over the steps, of a run with ema.decay"),
            Option("--out", Place("new folder"), "where the model goes; left out: RUN/model-STEP"),
        ),
    ),
    Command("recipes", "list the shipped recipes, one line each", "conceptron recipes", "engine.recipe.shipped:main"),
    Command(
        "describe", "what the model of a recipe costs, before training",
        "conceptron describe pretrain/concept.yaml model.num_concepts=256", "bench.describe:main",
        (
            RECIPE, OVERRIDES, VOCABULARY,
            Option("--max-tokens", Whole(0, 2**26), "longest text of the second table; 0: without it", 65536),
            Option("--out", Place("new folder"), "also write both tables there: JSON, CSV, Markdown"),
        ),
    ),
    Command(
        "generate", "fill or continue text with a trained model",
        'conceptron generate runs/demo/model --mode fill --text "Return a new [MASK] of given shape and type."',
        "engine.generate:main",
        (
            Option("checkpoint", Text("a model"), "a Hugging Face folder, such as runs/demo/model, or a hub id"),
            Option("--text", Text(), "the text to read", either="text"),
            Option("--file", Place("file"), "a UTF-8 file to read instead", either="text"),
            Option("--mode", Word(("prefix", "fill", "infill", "concepts")), (
                "prefix: continue the text; fill: replace each mask token in it by a token; infill: by --length "
                "tokens; concepts: write it again from its concepts alone"
            ), "prefix"),
            Option("--length", Whole(1, 2**20), "tokens to write; 32, for concepts as many as the text has"),
            Option("--read-once", None, (
                "encode the given text only, not what is written (for models trained with prefix_diffusion)"
            )),
            Option("--steps", Whole(1, 2**20), "denoising steps", 16),
            Option("--schedule", Word(("linear", "cosine")), "how many tokens a step", "cosine"),
            Option("--unmask", Word(("confidence", "margin", "entropy", "random", "mdlm", "remdm")), (
                "which come first; mdlm: ancestral; remdm: and some are hidden again"
            ), "confidence"),
            Option("--remask", Number(0, 1), "share that remdm hides again in a step", 0.1),
            Option("--block", Whole(0, 2**20), "tokens written at a time, left to right; 0: all", 0),
            Option("--guidance", Number(0, 1000), "strength w of guidance by the concepts", 0.0),
            Option("--temperature", Number(0, 1000), "0 takes the most likely token", 0.0),
            Option("--top-k", Whole(0), "draw from the k most likely tokens; 0: from all", 0),
            Option("--top-p", Number(0, 1, above=True), "draw from the fewest tokens of this probability", 1.0),
            Option("--clean-up", None, "the last step takes the most likely tokens"),
            Option("--samples", Whole(1, 2**20), "texts to write", 1),
            Option("--seed", SEED, "of the first; the next have the next seeds", 0),
        ),
    ),
    Command(
        "build", "write the model of a recipe as it starts, nothing trained",
        "conceptron build pretrain/read.yaml model.backbone=DIR --out runs/read/model", "engine.build:main",
        (
            RECIPE, OVERRIDES,
            Option("--out", Place("new folder"), "the folder of the model", required=True),
        ),
    ),
    Command(
        "embed", "vectors of documents of any length, as parquet; a command that was stopped goes on",
        "conceptron embed docs/ --model runs/read/model --out vectors.parquet --concepts",
        "engine.embedding.embed:main",
        (
            Option("files", Text("files"), "txt, jsonl, jsonl.gz or parquet files, folders or globs of them", (), "+",
                   "FILES"),
            MODEL,
            Option("--out", Place("new file"), "a .parquet file: id, vector", required=True),
            Option("--concepts", None, "also the vector of each concept, and the characters that it stands for"),
            TEXT_COLUMN,
        ),
    ),
    Command(
        "search", "the documents that answer a question, and the passage in each",
        'conceptron search "what is a context manager?" docs/ --model runs/read/model', "engine.embedding.search:main",
        (
            Option("query", Text("a question"), "one or more questions, each in quotes", (), "+"),
            Option("path", Text("a path"), "a file, a folder or a glob of txt, jsonl or parquet files"),
            MODEL,
            Option("--top", Whole(1, 1000), "documents for each question", 3),
            Option("--index", Place("new folder"), "where concepts are kept; left out: in the cache folder"),
            Option("--teacher", Text("a model"), (
                "the sentence encoder that embeds the questions; left out: the model's own backbone, or what the model "
                "was distilled from"
            )),
            TEXT_COLUMN,
        ),
    ),
    Command(
        "analyze", "report on a run or a model: plots, held-out figures, gates", "conceptron analyze runs/demo",
        "bench.analyze:main",
        (
            Option("path", Text("a run or a model"), "runs/NAME, or a Hugging Face folder"),
            Option("--text", Text("files, folders or globs"), "held-out text for a bare model", (), "+", "FILE"),
        ),
    ),
    Command(
        "gate", "is a run worth going on with? PASS, FAIL, UNKNOWN a metric, and what to do next",
        "conceptron gate runs/demo --strict", "bench.gate:main",
        (
            Option("run", Place("folder"), "runs/NAME, trained and analysed"),
            Option("--strict", None, "exit code 1 where a gate fails"),
            Option("--seeds", None, "also the thresholds of the planning documents"),
            Option("--file", Place("file"), "gates of your own instead of bench/gates.yaml"),
        ),
    ),
    Command(
        "compare", "runs side by side: training, held-out figures, concepts, gates",
        "conceptron compare runs/demo runs/other", "bench.compare:runs",
        (
            Option("runs", Place("folder"), "two or more, trained and analysed", (), "+", "RUN"),
            Option("--seeds", None, "also the planning documents' published values, marked"),
            Option("--out", Place("new folder"), "also write the table there: page, JSON, CSV, Markdown"),
        ),
    ),
    Command(
        "evaluate", "a model on SCROLLS, LongBench, GLUE, retrieval, synthetic tasks, beside its floors",
        "conceptron evaluate --task scrolls/contract_nli,similarity --model runs/read/model data=DATA",
        "bench.evaluate:main",
        (
            Option("--task", Text("tasks"), "names such as glue/stsb, or of a whole folder: scrolls; commas between",
                   required=True, shown="NAME[,NAME]"),
            Option("--model", Text("a model"), "a model folder, a finished run, or any encoder of the hub",
                   required=True),
            Option("settings", Text("field=value"), (
                "data, cache: folders; train, report: splits; piece: tokens read at once; concepts: of a sentence; "
                "answer=written; seeds; finetune: a recipe; rates; without=bag,untrained; beside: folders where "
                "other models were evaluated, whose rows stand in this table, too"
            ), (), "*", "field=value"),
            Option("--limit", Whole(1), "only so many pairs, or documents, of every task", shown="N"),
            Option("--no-floors", None, "only the model: no majority, BM25, bag, untrained, ablations"),
            Option("--protocol", Word(("seeds",)), "fine-tune as the seeds did, to compare with their figures"),
            Option("--costs", None, "also time and memory of a document of each task, beside full attention"),
            out("runs/evaluate"),
        ),
    ),
    Command(
        "score", "anybody's predictions by a task's official metric",
        "conceptron score scrolls/qmsum --predictions p.json --references r.json", "bench.score:main",
        (
            Option("task", Text("a task"), "its name; scrolls: the whole benchmark, {task: {id: prediction}}"),
            Option("--predictions", Place("file"), "JSON: {id: prediction}", required=True),
            Option("--references", Place("file"), "JSON: {id: reference or [references]}", required=True),
        ),
    ),
    Command(
        "bench kernels", "every operator beside SDPA, Flex, Liger, CCE: time, memory, error",
        "conceptron bench kernels concept_attention --matrix cpu", "bench.kernels.run:main",
        (
            Option("operators", Word(OPERATORS), f"of {', '.join(OPERATORS)}; all by default", (), "*", "OPERATOR"),
            Option("--matrix", Word(("small", "cpu", "anchor", "wide")), "the cases; anchor on a GPU, else cpu"),
            Option("--providers", Word(PROVIDERS), f"of {', '.join(PROVIDERS)}; all by default", None, "+", "NAME"),
            Option("--dtype", Word(("bfloat16", "float16", "float32")), "bfloat16 on a GPU, else float32"),
            Option("--seconds", Number(0.001, 3600), "timed for each provider and mode", 0.3),
            Option("--limit", Number(0.001, 86400), "seconds a provider may take to get ready", 60.0),
            RESUME, DEVICE, out("runs/bench/kernels"),
        ),
    ),
    Command(
        "bench scaling", "time and memory against N beside other encoders, the fitted exponents",
        "conceptron bench scaling --max-tokens 16384", "bench.scaling:main",
        (
            Option("--min-tokens", TOKENS, "shortest text", 512),
            Option("--max-tokens", TOKENS, "longest text", 16384),
            *WIDTHS,
            Option("--only", Text("an encoder"), "these encoders; all by default", None, "+", "ENCODER"),
            Option("--variants", Text("field=value"), (
                "further concept encoders, each by its fields of ConceptConfig: layer_kind=bixt num_token_layers=2"
            ), (), "+", "FIELD=VALUE[,...]"),
            Option("--backbone", Text("a model"), "instead: this module in windows, in full attention", shown="DIR"),
            Option("--seconds", Number(0.001, 3600), "timed for each case, at least three calls", 1.0),
            Option("--limit", Number(0.001, 86400), "seconds a call may be expected to take", 20.0),
            DEVICE, RESUME, out("runs/bench/scaling"),
        ),
    ),
    Command(
        "bench memory", "where a training step's memory goes; the longest text that fits, checked",
        "conceptron bench memory --concepts 128 --fit 2", "bench.memory:main",
        (
            Option("--min-tokens", TOKENS, "shortest text", 512),
            Option("--max-tokens", TOKENS, "longest text", 8192),
            Option("--concepts", Whole(1, 65536), "numbers of concepts", (128, 512), "+", "C"),
            *WIDTHS,
            Option("--encoder-tokens", TOKENS, "lengths of the table of encoders; none: without it", (16384, 65536),
                   "*", "N"),
            Option("--fit", Number(0, 1e5, above=True), "GiB for which the longest N is predicted", 1.0, shown="GIB"),
            Option("--snapshot", Place("new file"), "also write a CUDA memory snapshot of the longest case"),
            DEVICE, RESUME, out("runs/bench/memory"),
        ),
    ),
    Command(
        "bench step", "how fast a recipe trains here: tokens/s, MFU, time by part, data loading alone",
        "conceptron bench step demo.yaml --steps 5", "bench.step:main",
        (
            RECIPE, OVERRIDES,
            Option("--synthetic", None, "random tokens instead of the recipe's data"), VOCABULARY,
            Option("--steps", Whole(1), "that are timed", 10), Option("--warm-up", Whole(0), "that are not", 3),
            Option("--bare", Whole(0), "steps more, each also by a bare loop of torch on a second model", 0),
            out("runs/bench/step"),
        ),
    ),
    Command(
        "bench compute", "what more iterations or fewer concepts at test time buy: quality, convergence, time",
        "conceptron bench compute runs/recursive --iterations 2 4 6 8 12", "bench.compute:main",
        (
            Option("path", Text("a run or a model"), "recursive (tied layers) or nested; runs/NAME, or a model folder"),
            Option("--text", Text("files, folders or globs"), "held-out text for a bare model", (), "+", "FILE"),
            Option("--iterations", Whole(1, 1024), "of tied layers; 1 to 16 by default", None, "+", "K"),
            Option("--concepts", Whole(1, 65536), "of a nested model; powers of two by default", None, "+", "C"),
            Option("--seconds", Number(0.001, 3600), "timed for each value", 0.5),
            out("runs/bench/compute"),
        ),
    ),
    Command(
        "bench ablation", "one change at a time, trained and measured: any table of recipes",
        "conceptron bench ablation recipes/ablation/defaults.yaml --seeds 0 1", "bench.ablation:main",
        (
            Option("table", Text("a table"), "a YAML file, such as recipes/ablation/defaults.yaml"),
            Option("overrides", Text("section.field=value"), "change the base of all rows", (), "*",
                   "section.field=value"),
            Option("--rows", Text("a row"), "only these", None, "+", "NAME"),
            Option("--seeds", SEED, "instead of the file's", None, "+", "S"),
            Option("--workers", Whole(0, 4096), "processes that train side by side; 0: only this one", 1),
            Option("--threads", Whole(1, 4096), "of each worker; left out: torch decides"),
            Option("--minutes", MINUTES, "instead of the file's"), out("runs/ablation"),
        ),
    ),
    Command(
        "bench meaning", "what a model's vectors mean: similarity, retrieval, geometry",
        "conceptron bench meaning runs/distill/model --data DATA", "bench.meaning:main",
        (
            Option("model", Text("a model"), "a model folder, a finished run, or any sentence encoder"),
            Option("--data", Place("folder"), "folder with glue/stsb, sick and openstax_books", required=True),
            Option("--queries", Text("a model"), "the sentence encoder that embeds the questions", shown="TEACHER"),
            Option("--backbone", Text("a model"), "speed is held against this encoder in windows", shown="DIR"),
            Option("--skip", Word(("sts", "chapters", "geometry", "content", "speed")), "leave these out", (), "+"),
            Option("--limit", Whole(1), "only the first N pairs of sentences", shown="N"),
            Option("--chapters", Whole(1, 100_000), "how many are searched", 100, shown="N"),
            Option("--name", Text("a name"), "of the result files; left out: the model's folder"),
            out("runs/bench/meaning"),
        ),
    ),
    Command(
        "bench parallel", "what one text over several GPUs sends, beside Ulysses and ring attention: counted",
        "conceptron bench parallel --tokens 1048576 --gpus 8 64 512", "bench.parallel:main",
        (
            Option("--tokens", Whole(1, 2**40), "N, of the text", 2**20),
            Option("--gpus", Whole(1, 2**20), "how many hold it", (8, 16, 32, 64, 128, 256, 512), "+", "P"),
            Option("--concepts", Whole(1, 2**20), "C", 128),
            Option("--width", Whole(1, 2**20), "d", 4096), Option("--heads", Whole(1, 2**16), "of a layer", 32),
            Option("--bandwidth", Number(0, 1e6, above=True), "GB/s that a GPU receives, assumed", 50.0),
            Option("--tflops", Number(0, 1e6, above=True), "that a GPU does, assumed", 400.0),
            out("runs/bench/parallel"),
        ),
    ),
    Command(
        "bench suite", "all of it within a time limit", "conceptron bench suite --gpu --minutes 9", "bench.suite:main",
        (
            Option("--gpu", None, "measure the GPU (without it: the CPU's small sizes)"),
            Option("--tiny", None, "measure next to nothing, to see that the suite runs"),
            Option("--minutes", MINUTES, "in all", 9.0),
            Option("--resume", None, "go on where a time limit cut the last call"), out("runs/bench/suite"),
        ),
    ),
    Command(
        "bench report", "tables and plots of a folder of results, pasted into documents",
        "conceptron bench report bench/results/cpu --paste README.md", "bench.report:main",
        (
            Option("folder", Place("folder"), "of results"),
            Option("--paste", Place("file"), "documents whose tables are written anew", (), "+", "FILE"),
        ),
    ),
    Command(
        "bench compare", "what got slower between two result folders, beyond the noise",
        "conceptron bench compare bench/results/cpu runs/bench/cpu", "bench.compare:main",
        (Option("old", Place("folder"), "results before"), Option("new", Place("folder"), "results after")),
    ),
    Command(
        "kernels compile", "registers, stack, shared memory, MMA of every kernel, without a GPU",
        "conceptron kernels compile --arch sm_90 --only concept_attention", "kernels.compile:main",
        (
            Option("--arch", Words(ARCHITECTURES), "which GPUs",
                   ("sm_80", "sm_90", "sm_100")),
            Option("--only", Text(), "configurations whose name contains this", ""),
            Option("--sample", Whole(1), "about one configuration in K", 1, shown="K"),
            Option("--builds", Place("file"), "a Python file whose builds() to compile instead of ours"),
            Option("--jobs", Whole(1, 4096), "compiler processes", 2),
            Option("--json", Place("new file"), "also write the rows there"),
            Option("--no-cache", None, "compile even what was compiled before"),
        ),
    ),
)  # fmt: skip
