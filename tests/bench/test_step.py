import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from conceptron.__main__ import perform
from conceptron.bench import step
from conceptron.bench.measure.overhead import Bare
from conceptron.engine.data import tokenizer
from conceptron.engine.errors import InputError
from conceptron.engine.recipe.load import load_recipe
from conceptron.models.masked_lm import ConceptForMaskedLM

TINY = ("model.hidden_size=32", "model.num_attention_heads=2", "model.intermediate_size=32", "model.num_concepts=16",
        "data.window=64", "batch.tokens=512", "batch.micro_tokens=256", "train.precision=fp32")  # fmt: skip


def test_presets_are_the_seeds_configurations():
    """Width 512, 8 heads, 128 concepts; L2 with a feed-forward of 1024, L6 with 2048; windows of 512."""
    for name, (source, *options) in step.PRESETS.items():
        recipe = load_recipe(source, options)
        layers, inner = {"l2": (2, 1024), "l6": (6, 2048)}[name[-2:]]
        model = recipe.model
        assert (model["hidden_size"], model["num_attention_heads"], model["num_concepts"]) == (512, 8, 128)
        assert (model["num_hidden_layers"], model["intermediate_size"], recipe.data.window) == (layers, inner, 512)
        assert recipe.objective["name"] == name.split("-")[1]


def test_a_step_tells_speed_parts_loading_and_padding(monkeypatch):
    monkeypatch.setattr(step, "matmul_flops", lambda device, dtype: 1e12)
    source, *options = step.PRESETS["seeds-diffusion-l2"]
    row = step.run(load_recipe(source, [*options, *TINY]), num_steps=2, warm_up=1, use_synthetic=True,
                   vocabulary=256)  # fmt: skip
    phases = sum(row[f"{name}_ms"] for name in ("data", "forward", "backward", "optimizer"))
    assert row["step_ms"] == pytest.approx(phases)
    assert row["tokens_per_step"] == 512 and row["tokens_per_s"] == pytest.approx(512 / row["step_ms"] * 1e3)
    assert row["mfu"] == pytest.approx(row["tflops"]) and row["tflops"] > 0  # the ceiling is 1 TFLOP/s here
    assert row["data_alone_tokens_per_s"] == pytest.approx(512 / row["data_alone_ms"] * 1e3)
    assert (row["vocabulary"], row["text"]) == (256, "random tokens")
    assert row["padding_avoided"] == 0, "synthetic windows are all of full length"
    for part in ("encoder", "decoder", "head"):
        assert row[f"{part}_forward_ms"] > 0 and row[f"{part}_backward_ms"] > 0
    assert "power_w" not in row and "nvml" not in row, "a CPU has no NVML"


@pytest.mark.parametrize("more", [
    ["contrastive={}", "regularization={terms: [t_regs]}"],
    ["objective={name: none}", "contrastive={}", "checkpoint.keep_best=null"],
    ["model.tie_layers=true", "model.iteration_sampling=random"],
    ["objective={name: mixed, parts: [{name: mlm}, {name: tsdae}]}"],
])  # fmt: skip
def test_a_step_has_all_that_the_recipe_adds(monkeypatch, more):
    monkeypatch.setattr(step, "matmul_flops", lambda device, dtype: 1e12)
    encoded = []
    encode = ConceptForMaskedLM.encode
    monkeypatch.setattr(ConceptForMaskedLM, "encode", lambda *given: encoded.append(1) or encode(*given))
    row = step.run(load_recipe("pretrain/mlm.yaml", [*TINY, *more]), 1, 1, use_synthetic=True, vocabulary=256)
    assert row["step_ms"] > 0 and bool(encoded) == ("encoder_forward_ms" in row) == ("none" not in more[0])


@pytest.mark.parametrize("stored", ["null", "0.1"])
def test_a_step_on_a_backbone(monkeypatch, tmp_path, stored):
    """Random text through a module of transformers; with stored states it is not called."""
    monkeypatch.setattr(step, "matmul_flops", lambda device, dtype: 1e12)
    words = tokenizer.train(["nothing is said here about anything at all"] * 3, 300)
    inner = BertConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                       intermediate_size=32, max_position_embeddings=64)  # fmt: skip
    BertModel(inner, add_pooling_layer=False).save_pretrained(tmp_path / "bert")
    words.save_pretrained(tmp_path / "bert")
    own = ["distill=null", f"model.backbone={tmp_path}/bert", f"data.tokenizer={tmp_path}/bert",
           "model.backbone_window=32", f"data.cache={tmp_path}/cache", f"data.states_gb={stored}", "train.steps=4",
           "objective.probability=0.5", "eval.tokens=64"]  # fmt: skip
    recipe = load_recipe("pretrain/read.yaml", [*TINY, *own])
    row = step.run(recipe, num_steps=2, warm_up=1, use_synthetic=True)
    assert row["tokens_per_step"] == 512 and row["tflops"] > 0 and row["encoder_forward_ms"] > 0
    assert ("backbone_forward_ms" in row) == (stored == "null")


def test_synthetic_text_has_the_words_of_the_recipe(tmp_path):
    recipe = load_recipe("demo.yaml", [])
    assert step.synthetic(recipe, None, 16).tokens.vocab_size == recipe.data.vocab_size
    recipe = load_recipe("demo.yaml", [f"data.tokenizer={tmp_path}/none"])
    with pytest.raises(InputError, match="--vocabulary"):
        step.synthetic(recipe, None, 16)
    assert step.synthetic(recipe, 300, 16).train[0].max() < 300


@pytest.mark.parametrize(("words", "size"), [
    (["demo.yaml"], 4096), (["demo.yaml", "data.vocab_size=512"], 512), (["demo.yaml", "--vocabulary", "300"], 300),
    (["seeds-mlm-l2"], step.SEEDS_VOCABULARY), (["seeds-mlm-l2", "data.tokenizer=pydocs", "data.vocab_size=600"], 600),
])  # fmt: skip
def test_the_vocabulary_is_the_recipes(monkeypatch, tmp_path, words, size):
    """Also that of a preset whose tokenizer is changed."""
    seen = []

    def run(recipe, steps, warm_up, use_synthetic, vocabulary, bare):
        seen.append(step.synthetic(recipe, vocabulary, 16).tokens.vocab_size)
        return {"vocabulary": seen[-1]}

    monkeypatch.setattr(step, "run", run)
    assert perform(["bench", "step", *words, "--synthetic", "--out", str(tmp_path)]) == 0
    assert seen == [size]


def test_a_vocabulary_without_synthetic_text_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(step, "run", lambda *given: pytest.fail("measured"))
    with pytest.raises(InputError, match=r"--vocabulary: .*add --synthetic"):
        perform(["bench", "step", "demo.yaml", "--vocabulary", "300", "--out", str(tmp_path)])


def test_what_is_timed_is_the_trainers_update(monkeypatch):
    """Label smoothing, the learning rate and dropout's seeds are those of training: the losses are the same."""
    monkeypatch.setattr(step, "matmul_flops", lambda device, dtype: 1e12)
    seen = []
    update = step.update
    monkeypatch.setattr(step, "update", lambda *given, **named: seen.append((given[3], named["lr"])) or
                        update(*given, **named))  # fmt: skip
    recipe = load_recipe("demo.yaml", [*TINY, "optim.lr=1e-2", "optim.warmup_steps=10", "train.steps=20"])
    step.run(recipe, 1, 1, use_synthetic=True)
    assert seen == [(0, pytest.approx(1e-3)), (1, pytest.approx(2e-3))]


def test_a_bare_loop_beside_it_learns_the_same(monkeypatch):
    """Two models from one seed, the same steps: without dropout their losses are equal."""
    monkeypatch.setattr(step, "matmul_flops", lambda device, dtype: 1e12)
    losses, update, bare_step = {"engine": [], "bare": []}, step.update, Bare.step
    monkeypatch.setattr(step, "update", lambda *given, **named: losses["engine"].append(
        (given[3], (result := update(*given, **named))[0]["loss"])) or result)  # fmt: skip
    monkeypatch.setattr(Bare, "step", lambda *given: losses["bare"].append((given[2], bare_step(*given))) or 0)
    given = [*TINY, "model.dropout=0", "optim.warmup_steps=0", "optim.schedule=wsd", "optim.lr=1e-3"]
    row = step.run(load_recipe("demo.yaml", given), 1, 0, use_synthetic=True, num_bare=4)
    assert [number for number, _ in losses["bare"]] == [1, 1, 2, 3, 4]  # once more, to warm up
    engine, bare = dict(losses["engine"]), dict(losses["bare"])
    assert bare[1] == pytest.approx(engine[0], rel=0.02) and bare[4] < bare[1]
    assert row["engine_overhead"] == pytest.approx(row["step_alone_ms"] / row["bare_step_ms"] - 1)


def test_padding_waste_by_hand():
    class Reader:
        def at(self, index):
            return type("L", (), {"windows": type("W", (), {"lengths": torch.tensor([4, 2, 6, 6])})})

        def windows(self, index):
            return [[0, 1], [2, 3]][index]

    # 4 + 2 of 2 x 4 rows, 6 + 6 of 2 x 6
    assert step.padding_waste(Reader(), [0, 1]) == pytest.approx(1 - 18 / 20)
    assert step.padding_waste(Reader(), [1]) == 0


def test_parts_add_up_to_the_pass():
    """Backward is told apart by the gradients that arrive: of the decoder's output, then of the concepts."""
    log = []

    class Part(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name, self.weight = name, nn.Parameter(torch.ones(()))

        def forward(self, x, *rest):
            log.append(self.name)
            out = x * self.weight
            out.register_hook(lambda grad: log.append(f"{self.name} backward"))
            return type("Out", (), {"last_hidden_state": out})() if self.name == "encoder" else out

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder, self.lm_head = Part("encoder"), Part("decoder"), Part("head")

        def forward(self, view, num_iterations=None):
            hidden = self.decoder(self.encoder(view).last_hidden_state)
            return type("Out", (), {"loss": self.lm_head(hidden).sum()})()

    class Engine:
        def __init__(self, model):
            self.model, self.set_gradient_accumulation_boundary = model, lambda boundary: None

        def __call__(self, view, num_iterations=None):
            return self.model(view)

        def backward(self, loss):
            loss.backward()

        def step(self):
            log.append("step")

    model = Model()
    ms = step.part_times(model, Engine(model), torch.ones(3), torch.device("cpu"))
    assert log == ["encoder", "decoder", "head", "head backward", "decoder backward", "encoder backward", "step"]
    parts = set(step.PARTS) - {"backbone"}  # which this model has not
    assert set(ms) == {f"{part}_{way}_ms" for part in parts for way in ("forward", "backward")}
    assert all(value >= 0 for value in ms.values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
