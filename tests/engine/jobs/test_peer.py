"""Fine-tuning of encoders of transformers: what they read, learn, export and resume, and bad input in one line."""

import json
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
    T5Model,
)

from conceptron.engine.data import tokenizer
from conceptron.engine.data.teacher import Teacher, reach
from conceptron.engine.errors import InputError
from conceptron.engine.labelled.examples import Example, examples
from conceptron.engine.labelled.joint import Joint, read_note
from conceptron.engine.labelled.task import load_task
from conceptron.engine.trainer import train

from ..running import lines
from .labelled import write_tasks

SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, initializer_range=0.1)
LIMIT = 40  # rows of positions
FAMILIES = {  # family -> (configuration, tokens of the longest input)
    "bert": (lambda v: BertConfig(vocab_size=v, max_position_embeddings=LIMIT, **SIZES), LIMIT),
    "roberta": (lambda v: RobertaConfig(vocab_size=v, max_position_embeddings=LIMIT, type_vocab_size=1, pad_token_id=0,
                                        **SIZES), LIMIT - 1),
    "mpnet": (lambda v: MPNetConfig(vocab_size=v, max_position_embeddings=LIMIT, pad_token_id=1, **SIZES), LIMIT - 2),
    "distilbert": (lambda v: DistilBertConfig(vocab_size=v, max_position_embeddings=LIMIT, dim=16, n_layers=1,
                                              n_heads=2, hidden_dim=16, pad_token_id=0, initializer_range=0.1), LIMIT),
    "modernbert": (lambda v: ModernBertConfig(vocab_size=v, max_position_embeddings=LIMIT, pad_token_id=0,
                                              bos_token_id=2, cls_token_id=2, eos_token_id=3, sep_token_id=3, **SIZES),
                   LIMIT),
}  # fmt: skip
RECIPE = """
run: {{folder: {folder}/runs, name: {name}}}
source: {source}
task: {{name: {task}, data: {folder}}}
optim: {{lr: 1e-2, warmup_steps: 2}}
batch: {{tokens: 900, micro_tokens: 450}}
train: {{steps: {steps}, precision: fp32}}
eval: {{every: 0}}
checkpoint: {{every: 3, keep_last: 2}}
"""


def with_template(words: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """[BOS] a [EOS] b [EOS], the second text of type 1, as BERT has it; and what sentence-transformers leave behind."""
    state = json.loads(words.backend_tokenizer.to_str())

    def special(name: str, kind: int) -> dict:
        return {"SpecialToken": {"id": name, "type_id": kind}}

    one = [special("[BOS]", 0), {"Sequence": {"id": "A", "type_id": 0}}, special("[EOS]", 0)]
    state["post_processor"] = {
        "type": "TemplateProcessing", "single": one,
        "pair": [*one, {"Sequence": {"id": "B", "type_id": 1}}, special("[EOS]", 1)],
        "special_tokens": {name: {"id": name, "ids": [words.convert_tokens_to_ids(name)], "tokens": [name]}
                           for name in ("[BOS]", "[EOS]")},
    }  # fmt: skip
    state["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), **tokenizer.SPECIAL,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny encoders that have learned nothing, and data of three tasks in which a word decides."""
    folder = tmp_path_factory.mktemp("peers")
    texts = write_tasks(
        folder, lambda i, said: f"{' '.join(said) * (1 + i % 3)} {i}", lambda asked, _: asked == "red"
    )  # fmt: skip
    words = with_template(tokenizer.train(texts, 320))
    for name, (config, _) in FAMILIES.items():
        torch.manual_seed(0)
        AutoModel.from_config(config(len(words))).save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    return folder


def run(folder, name, task, steps=6, source="bert", *overrides):
    recipe = folder / f"{name}.yaml"
    recipe.write_text(RECIPE.format(folder=folder, name=name, task=task, steps=steps, source=folder / source))
    return train(recipe, overrides)


def losses(path) -> list[float]:
    return [entry["loss"] for entry in lines(path)]


@pytest.mark.parametrize(
    ("source", "task"),
    [(name, "scrolls/contract_nli") for name in FAMILIES] + [("bert", "scrolls/quality"), ("roberta", "glue/stsb")],
)
def test_learns_and_exports(folder, source, task, capsys):
    path = run(folder, f"{source}-{task.replace('/', '-')}", task, 18, source)
    found, said = losses(path), capsys.readouterr().err
    assert len(found) == 18 and sum(found[-3:]) < 0.97 * sum(found[:3])
    assert f"from {folder / source}: drawn are classifier." in said
    limit, words = FAMILIES[source][1], AutoTokenizer.from_pretrained(path / "model")
    cut = {each.document for each in examples(load_task(task), "train", folder) for option in each.options or [""]
           if len(words(f"{each.question} {option}".strip(), each.document).input_ids) > limit}  # fmt: skip
    assert (f"{len(cut)} documents cut at the {limit} tokens of an input" in said) == (len(cut) > 0)
    assert (len(cut) > 0) == (task != "glue/stsb")
    model, info = AutoModelForSequenceClassification.from_pretrained(path / "model", output_loading_info=True)
    assert model.config.model_type == source and not info["missing_keys"] and not info["unexpected_keys"]
    note = read_note(path / "model")
    assert note.name == task and note.max_tokens == limit
    assert (note.label_offset, note.label_scale) == (0, 1) or task == "glue/stsb"
    assert words("a", "b").input_ids[0] == words.bos_token_id
    assert task in (path / "model" / "README.md").read_text()


def test_values_are_normalised_and_undone(folder):
    path = run(folder, "values", "glue/stsb", 60)
    note, rows = read_note(path / "model"), (folder / "glue/stsb/train.jsonl").read_text().splitlines()
    values = [json.loads(row)["label"] for row in rows]
    assert note.label_offset == pytest.approx(np.mean(values), abs=0.2)
    assert note.label_scale == pytest.approx(np.std(values), abs=0.2)
    assert lines(path, "eval")[-1]["pearson"] > 0.9
    model = AutoModelForSequenceClassification.from_pretrained(path / "model").eval()
    words = AutoTokenizer.from_pretrained(path / "model")
    batch = words(["The door is red", "The door is blue"], ["A red door", "A green door"], padding=True,
                  return_tensors="pt")  # fmt: skip
    same, other = (note.label_offset + note.label_scale * model(**batch).logits[:, 0]).tolist()
    assert same == pytest.approx(4, abs=0.7) and other == pytest.approx(1, abs=0.7)


def test_a_resumed_run_is_the_same_run(folder, capsys):
    """With the dropout that the family has."""
    paths = [run(folder, name, "scrolls/contract_nli", 6) for name in ("whole", "half")]
    half = paths[1]
    shutil.rmtree(sorted((half / "checkpoints").iterdir())[-1])  # the run was killed after step 3
    shutil.rmtree(half / "model")
    run(folder, "half", "scrolls/contract_nli", 6, "bert", "resume=auto")
    assert f"going on from {half}/checkpoints/step-00000003" in capsys.readouterr().err
    assert losses(half)[-3:] == losses(paths[0])[-3:]
    a, b = (AutoModelForSequenceClassification.from_pretrained(path / "model").state_dict() for path in paths)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("learned", ["head", "all"])
def test_what_is_learned(folder, learned):
    path = run(folder, f"learned-{learned}", "glue/stsb", 2, "bert", f"learned={learned}", "train.recompute=true")
    before = AutoModel.from_pretrained(folder / "bert").state_dict()
    after = AutoModelForSequenceClassification.from_pretrained(path / "model").bert.state_dict()
    same = {name: torch.equal(before[name], after[name]) for name in before if "pooler" not in name}
    assert all(same.values()) if learned == "head" else not any(v for k, v in same.items() if "attention" in k)
    assert not torch.equal(before["pooler.dense.weight"], after["pooler.dense.weight"])


def test_batches_of_none_and_of_any_size_are_the_same_step(folder):
    """Where a step has fewer examples than micro-batches, some are empty; the step is the same but for rounding."""
    config = json.loads((folder / "bert/config.json").read_text())
    shutil.copytree(folder / "bert", folder / "calm", dirs_exist_ok=True)
    calm = config | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "calm/config.json").write_text(json.dumps(calm))
    few = ("batch.tokens=200", "batch.micro_tokens=200", "task.limit=3")
    many = ("batch.tokens=200", "batch.micro_tokens=25", "task.limit=3")
    a, b = (losses(run(folder, name, "glue/stsb", 3, "calm", *how)) for name, how in (("few", few), ("many", many)))
    assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_input_is_what_the_tokenizer_makes_of_it(folder, name):
    """As long as it fits; then the document loses its end, of a pair the longer text does, and the limit is exact: the
    model reads such an input, and none that is longer by one."""
    model, words = AutoModel.from_pretrained(folder / name), AutoTokenizer.from_pretrained(folder / name)
    limit = FAMILIES[name][1]
    assert reach(model) == limit
    joint = Joint(words, model, load_task("scrolls/contract_nli"), 10**6, "source")
    ((short,),) = joint.read([Example("a", "The door is red.", "The boat is blue.", None)])
    whole = words("The door is red.", "The boat is blue.", truncation=False)
    assert short.ids.tolist() == whole.input_ids and not short.is_cut and short.seen == short.given
    assert short.types.tolist() == whole.token_type_ids
    document = "The boat is blue. " * 40
    ((long,),) = joint.read([Example("a", "The door is red.", document, None)])
    cut = words("The door is red.", document, truncation="only_second", max_length=limit)
    assert long.ids.tolist() == cut.input_ids and len(long.ids) == limit and long.is_cut
    assert long.seen == limit - 3 - len(words("The door is red.", add_special_tokens=False).input_ids) < long.given
    batch = joint.pad([short, long])
    given = {key: value for key, value in batch._asdict().items() if value is not None}
    assert ("token_type_ids" in given) == (name == "bert")
    states = model(**given).last_hidden_state
    assert torch.isfinite(states[0, : len(short.ids)]).all() and torch.isfinite(states[1]).all()
    ((flooded,),) = joint.read([Example("a", document, "The door is red.", None)])
    assert len(flooded.ids) == limit and flooded.seen == 0 and flooded.is_cut
    pair = Joint(words, model, load_task("glue/stsb"), 30, "source")
    ((mixed,),) = pair.read([Example("a", document, "The door is red.", None)])
    assert len(mixed.ids) == 30 and mixed.seen == mixed.given and mixed.is_cut
    single = Joint(words, model, load_task("glue/sst2"), 30, "source")
    ((once,),) = single.read([Example("a", "The door", "The door", None)])
    assert once.ids.tolist() == words("The door").input_ids


@pytest.mark.parametrize("name", ["roberta", "mpnet"])
def test_a_teacher_reads_as_far_as_its_positions_go(folder, name):
    teacher = Teacher(str(folder / name))
    assert teacher.max_tokens == FAMILIES[name][1] - 2
    assert np.isfinite(teacher.embed(["The boat is blue. " * 40])).all()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("task.states_gb=1", "task.states_gb: expected nothing: it is for this package's models"),
        ("model={pair_features: cosine}", "model.pair_features: a field of this package's models"),
        ("train.keep=ids", "train.keep: expected nothing"),
        ("train.compile=true", "train.compile: expected nothing"),
        ("train.checkpoint_backbone=true", "train.checkpoint_backbone: expected nothing"),
        ("optim.muon={}", "optim.muon: expected nothing"),
        ("task.max_tokens=4", "reads 4 tokens, 3 of which are special ones"),
        ("batch.micro_tokens=8", "expected room for the longest document"),
        ("source={folder}/t5", "expected an encoder that transformers classifies texts with, got t5"),
        ("source={folder}/bare", "source: {folder}/bare: no tokenizer.json"),
        ("source={folder}/glue", "expected a model folder, there is no config.json"),
        ("source={folder}/strange", "its tokenizer is of another model"),
        ("source={folder}/lacking", "weights are missing, bert.encoder.layer.0"),
        ("source={folder}/lost", "numbers of bert.embeddings.word_embeddings.weight are not finite"),
    ],
)
def test_bad_input_is_one_line(folder, override, says):
    odd = override.partition("{folder}/")[2]
    if odd not in ("", "glue") and not (folder / odd).exists():
        make_odd(folder, odd)
    with pytest.raises(InputError) as caught:
        run(folder, "refused", "glue/stsb", 2, "bert", override.replace("{folder}", str(folder)))
    assert says.replace("{folder}", str(folder)) in str(caught.value) and "\n" not in str(caught.value)
    assert not (folder / "runs" / "refused").exists()


def make_odd(folder, name):
    """A folder that cannot be fine-tuned."""
    words, sizes = AutoTokenizer.from_pretrained(folder / "bert"), SIZES | {"max_position_embeddings": LIMIT}
    torch.manual_seed(0)
    if name == "t5":
        config = T5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        T5Model(config).save_pretrained(folder / name)
    else:
        num_rows = 10 if name == "strange" else len(words)
        model = BertForSequenceClassification(BertConfig(vocab_size=num_rows, **sizes))
        state = model.state_dict()
        if name == "lost":
            state["bert.embeddings.word_embeddings.weight"][3, 3] = float("nan")
        kept = {key: value for key, value in state.items() if name != "lacking" or ".layer.0.attention" not in key}
        model.save_pretrained(folder / name, state_dict=kept)
    if name != "bare":
        words.save_pretrained(folder / name)


@pytest.mark.parametrize("change", [{"name": 3}, {"max_tokens": 0}, {"extra": 1}, {"label_scale": "much"}])
def test_a_broken_note_is_one_line(folder, change, tmp_path):
    config = json.loads((folder / "bert/config.json").read_text())
    note = {"name": "glue/stsb", "max_tokens": 8, "label_offset": 0.0, "label_scale": 1.0}
    assert read_note(folder / "bert") is None
    (tmp_path / "config.json").write_text(json.dumps(config | {"conceptron_task": note | change}))
    with pytest.raises(InputError, match="conceptron_task: expected name, max_tokens, label_offset, label_scale"):
        read_note(tmp_path)
