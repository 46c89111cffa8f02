"""Pretrained token layers: states equal to transformers' own, whatever the family, the windows and the batch."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from conceptron.models.backbone import Backbone, calls, cut
from conceptron.models.backbone_config import LAYERS
from conceptron.models.backbone_source import backbone_of, describe, load
from conceptron.models.config import ConceptConfig
from conceptron.models.encoder import ConceptEncoder
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.packing import Packed, pack
from conceptron.models.tasks.heads import ConceptForSequenceClassification

SIZES = dict(
    vocab_size=60, hidden_size=24, num_hidden_layers=4, num_attention_heads=4, intermediate_size=40, pad_token_id=1,
    max_position_embeddings=40,
)  # fmt: skip
OWN = {
    "distilbert": dict(dim=24, n_layers=4, n_heads=4, hidden_dim=40),
    "modernbert": dict(local_attention=6, global_attn_every_n_layers=2),
    "ultrabert": dict(sliding_window=3, num_key_value_heads=2, bos_token_id=2, eos_token_id=3),
    "llama": dict(num_key_value_heads=2), "qwen2": dict(num_key_value_heads=2),
    "qwen3": dict(num_key_value_heads=2, head_dim=8),
}  # fmt: skip
SPECIAL = {"llama": ([], []), "qwen2": ([], []), "qwen3": ([], [])}
FAMILIES = [family for family in LAYERS if family not in ("camembert", "xlm-roberta")]  # which are roberta's
OURS = dict(vocab_size=60, hidden_size=32, num_concepts=4, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=40, num_decoder_layers=1, backbone_window=16)  # fmt: skip


def source(family: str, **options) -> torch.nn.Module:
    """A random model with norms and biases that are not one and zero."""
    generator = torch.Generator().manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(family, **{**SIZES, **OWN.get(family, {}), **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else 0.25 * noise)
    return model.eval()


@pytest.fixture
def folder_of(tmp_path):
    def save(family: str, **options) -> Path:
        folder = tmp_path / family
        source(family, **options).save_pretrained(folder)
        return folder

    return save


def described(folder: Path, family: str) -> dict:
    prefix, suffix = SPECIAL.get(family, ([2], [3]))
    return {**describe(folder), "prefix": prefix, "suffix": suffix}


def encoder_on(folder: Path, family: str, kind=ConceptEncoder, **changes):
    torch.manual_seed(1)
    model = kind(ConceptConfig(**{**OURS, "backbone": described(folder, family), **changes})).eval()
    load(backbone_of(model), folder, model.config.backbone_layers)
    return model


def words(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(5, 60, (n,), generator=generator) for n in lengths]


@torch.no_grad()
def their_states(model, family: str, ids: torch.Tensor, **options) -> torch.Tensor:
    """Of one text, as the library computes it, special tokens left out afterwards."""
    prefix, suffix = SPECIAL.get(family, ([2], [3]))
    full = torch.cat((torch.tensor(prefix, dtype=torch.long), ids, torch.tensor(suffix, dtype=torch.long)))
    return model(full[None], **options).last_hidden_state[0, len(prefix) : len(prefix) + len(ids)]


# --- states


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_the_librarys_own(family, folder_of):
    """Short texts of many lengths in one batch, and the windows of a long one, each against one call of its own."""
    folder = folder_of(family)
    theirs = AutoModel.from_pretrained(folder).eval()
    encoder = encoder_on(folder, family)
    lengths = [14, 1, 0, 9, 13, 31]
    texts = words(*lengths)
    got = encoder.backbone(pack(texts)).split(lengths)
    for text, states in zip(texts[:-1], got[:-1], strict=True):
        if len(text):
            expected = their_states(theirs, family, text)
            assert expected.std() > 0.05 and (states - expected).abs().max() < 1e-5
    windows = cut(np.array([31]), encoder.backbone.capacity, 0)
    assert len(windows.starts) == (2 if family in SPECIAL else 3)
    for start, length, first, end in zip(*windows, strict=True):
        expected = their_states(theirs, family, texts[-1][start : start + length])
        assert (got[-1][first:end] - expected[first - start : end - start]).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_causal_model_can_look_both_ways(family, folder_of):
    folder, (text,) = folder_of(family), words(12)
    theirs = AutoModel.from_pretrained(folder).eval()
    causal, both = (encoder_on(folder, family, backbone_two_sided=two).backbone(pack([text])) for two in (False, True))
    full = torch.zeros(1, 1, 12, 12)
    mask = {"full_attention": full} if family == "qwen3" else full  # a mask that hides nothing, given by hand
    expected = their_states(theirs, family, text, attention_mask=mask)
    assert (both - expected).abs().max() < 1e-5 and (both - causal).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [0, 2, [1, 3]])
def test_some_of_the_layers(family, layers, folder_of):
    """Against the library's model whose other layers are left out of its own list."""
    folder, (text,) = folder_of(family), words(11)
    theirs = AutoModel.from_pretrained(folder).eval()
    kept = list(range(layers)) if isinstance(layers, int) else layers
    parent, _, name = LAYERS[family].rpartition(".")
    stack = theirs.get_submodule(LAYERS[family])
    kinds = getattr(theirs.config, "layer_types", None)
    setattr(theirs.get_submodule(parent), name, torch.nn.ModuleList(stack[i] for i in kept))
    theirs.config.num_hidden_layers, theirs.config.use_cache = len(kept), False
    if kinds:
        theirs.config.layer_types = [kinds[i] for i in kept]
    encoder = encoder_on(folder, family, backbone_layers=layers)
    assert len(encoder.backbone.layers) == len(kept)
    assert (encoder.backbone(pack([text])) - their_states(theirs, family, text)).abs().max() < 1e-5


def test_windows_cover_every_token_once():
    lengths = np.array([0, 1, 14, 15, 28, 29, 100, 0, 57])
    for capacity, overlap in ((14, 0), (14, 4), (14, 7), (1, 0)):
        windows = cut(lengths, capacity, overlap)
        taken = np.concatenate([np.arange(a, b) for a, b in zip(windows.first, windows.end, strict=True)])
        assert (taken == np.arange(lengths.sum())).all() and windows.lengths.max() <= capacity
        text = np.searchsorted(np.cumsum(lengths), windows.starts, side="right")
        assert all(len(set(windows.lengths[text == i])) == 1 for i in set(text))
        for i in np.flatnonzero(text[1:] == text[:-1]):  # farthest from the edges that neighbours cut
            shared_from, shared_to = windows.starts[i + 1], windows.starts[i] + windows.lengths[i]
            assert shared_to - shared_from >= overlap
            assert windows.end[i] == (shared_from + shared_to) // 2 == windows.first[i + 1]


def test_hardly_any_padding_is_computed():
    lengths = np.random.default_rng(0).integers(1, 255, size=3000)
    parts = list(calls(lengths, 2))
    assert sorted(np.concatenate(parts)) == list(range(3000))
    computed = sum(len(part) * (lengths[part].max() + 2) for part in parts)
    assert computed < 1.1 * (lengths + 2).sum() and len(parts) < 120
    assert max(len(part) * (lengths[part].max() + 2) for part in parts) <= 8192


def test_texts_do_not_see_their_batch(folder_of):
    folder = folder_of("bert")
    encoder = encoder_on(folder, "bert", backbone_overlap=4)
    texts = words(40, 3, 15)
    together = encoder.backbone(pack(texts)).split([40, 3, 15])
    for text, states in zip(texts, together, strict=True):
        assert (encoder.backbone(pack([text])) - states).abs().max() < 1e-5


def test_special_tokens_of_a_tokenizer_are_not_read_twice(folder_of):
    """A padded batch as a tokenizer makes it is the bare text; a text that is one of them by chance stays."""
    encoder = encoder_on(folder_of("bert"), "bert")
    texts = words(5, 3)
    ids = torch.tensor([[2, *texts[0].tolist(), 3], [2, *texts[1].tolist(), 3, 1, 1]])
    expected = encoder(packed=pack(texts))
    got = encoder(input_ids=ids, attention_mask=(ids != 1).long())
    assert torch.allclose(got.last_hidden_state, expected.last_hidden_state, atol=1e-6)
    assert torch.equal(got.anchors, expected.anchors)
    bare = encoder(input_ids=texts[0][None])
    assert torch.allclose(bare.last_hidden_state[0], expected.last_hidden_state[0], atol=1e-6)


@pytest.mark.parametrize("kind", [ConceptForMaskedLM, ConceptForSequenceClassification])
def test_nor_by_models_with_a_head(kind, folder_of):
    model, (text,) = encoder_on(folder_of("bert"), "bert", kind), words(5)
    got = model(torch.tensor([[2, *text.tolist(), 3]]))
    assert torch.allclose(got.concepts, model(text[None]).concepts, atol=1e-6)


def test_a_backbone_embeds_for_itself(folder_of):
    with pytest.raises(ValueError, match="inputs_embeds: expected input_ids: a backbone"):
        encoder_on(folder_of("bert"), "bert")(inputs_embeds=torch.ones(1, 3, 24))


# --- concepts


def test_concepts_read_them_like_any_tokens(folder_of):
    """Another width is projected; token_norm stands in between; the head is the backbone's own table."""
    model = encoder_on(folder_of("bert"), "bert", ConceptForMaskedLM)
    encoder = model.encoder
    packed = pack(words(20, 7))
    encoder.keep = "keys"
    read = encoder.read_tokens(packed)
    expected = encoder.token_norm(encoder.widen_tokens(encoder.backbone(packed)))
    assert torch.equal(read.states, expected) and encoder.widen_tokens.weight.shape == (32, 24)
    assert model.lm_head.weight is encoder.backbone.embeddings.weight is model.decoder.embed_tokens.weight
    assert encoder.embed_tokens is None and not model.lm_head.weight.requires_grad


STATE = dict(hidden_size=24, init_queries="state", num_hidden_layers=2)


@pytest.mark.parametrize("num_concepts", [1, 3, 11])
def test_the_mean_stays_the_backbones_with_any_number_of_concepts(num_concepts, folder_of):
    encoder = encoder_on(folder_of("bert"), "bert", **{**STATE, "num_concepts": 7})
    packed = pack(words(30, 5))
    output = encoder(packed=packed, num_concepts=num_concepts)
    means = torch.stack([text.mean(0) for text in encoder.backbone(packed).split((30, 5))])
    assert output.last_hidden_state.shape == (2, num_concepts, 24)
    assert (output.pooler_output - means).abs().max() < 1e-5
    assert encoder.as_states(output.last_hidden_state).shape == (2, num_concepts, 24)


def test_states_that_are_kept_give_the_gradients_of_keys(folder_of):
    encoder, found = encoder_on(folder_of("bert"), "bert", **STATE, backbone_train="all").double(), {}
    for module in encoder.layers.modules():
        if getattr(module, "starts_at_zero", False):  # what is written would have no gradient beyond it
            torch.nn.init.normal_(module.weight, std=0.1)
    for encoder.keep in ("keys", None):
        encoder.zero_grad()
        encoder(packed=pack(words(20, 7))).last_hidden_state.square().sum().backward()
        found[encoder.keep] = {name: x.grad.clone() for name, x in encoder.named_parameters() if x.grad is not None}
    assert found["keys"].keys() == found[None].keys() and any("backbone" in name for name in found[None])
    for name, expected in found["keys"].items():
        assert (found[None][name] - expected).abs().max() <= 1e-9 * expected.abs().max() + 1e-12, name


@pytest.mark.parametrize("lengths", [(3, 1, 40, 17, 100), (0, 5)])
def test_untrained_concepts_have_the_backbones_mean(lengths, folder_of):
    encoder = encoder_on(folder_of("bert"), "bert", **{**STATE, "num_concepts": 7})
    packed = pack(words(*lengths))
    encoder.backbone.calibrate(pack(words(200)))
    states = encoder.backbone(packed)
    output = encoder(packed=packed)
    for text, pooled in zip(states.split(lengths), output.pooler_output, strict=True):
        if len(text):
            assert (pooled - text.mean(0)).abs().max() < 1e-5
    assert (encoder.concepts.weight.mean(0)).abs().max() < 1e-6 and output.last_hidden_state.isfinite().all()
    parts = encoder.as_states(output.last_hidden_state)[-1 if lengths[-1] == 100 else 1]
    assert parts.std(0).mean() > 0.1 * states[-lengths[-1] :].std(0).mean()  # each is the mean around its anchor
    if lengths[-1] == 100:
        first = states[-100 : -100 + 14].mean(0) * 14 + states[-100 + 14] * (100 / 7 - 14)
        assert (parts[0] - first / (100 / 7)).abs().max() < 1e-5


@pytest.mark.parametrize("trained", ["none", "all"])
def test_dropout_is_off_before_anybody_asks(trained, folder_of):
    """A new module of transformers is in training mode, in which states and what is measured of them are random."""
    folder = folder_of("bert")
    config = ConceptConfig(**OURS, backbone=described(folder, "bert"), backbone_train=trained)
    backbone, texts = Backbone(config), pack([torch.arange(4, 30), torch.arange(4, 12)])
    backbone.calibrate(texts)
    measured = backbone.mean.clone()
    backbone.calibrate(texts)
    assert torch.equal(backbone.mean, measured) and backbone.training
    if trained == "none":
        assert torch.equal(backbone(texts), backbone(texts))


def test_calibration_centres(folder_of):
    encoder = encoder_on(folder_of("bert"), "bert", **STATE)
    packed = pack(words(60, 50))
    encoder.backbone.calibrate(packed)
    states = encoder.backbone.centred(encoder.backbone(packed))
    backbone = encoder.backbone  # whose mean is a float32 number, far from zero beside the scale of such a small module
    rounding = torch.finfo(torch.float32).eps * backbone.mean.abs().max() / backbone.scale
    assert states.mean(0).abs().max() < 1e-6 + rounding and rounding < 1e-4
    assert states.square().mean() == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match="at least one token"):
        encoder.backbone.calibrate(pack([[]]))


def test_stored_states_stand_in_for_the_module(folder_of):
    encoder = encoder_on(folder_of("bert"), "bert", **STATE)
    packed = pack(words(20, 7))
    expected = encoder(packed=packed).last_hidden_state
    states = encoder.backbone(packed)
    encoder.backbone.model = None
    assert torch.equal(encoder(packed=packed._replace(states=states)).last_hidden_state, expected)


# --- training


@pytest.mark.parametrize("trained, free", [("none", set()), ("last 1", {3}), ("last 2", {2, 3}), ("all", {0, 1, 2, 3})])
def test_what_is_trained(trained, free, folder_of, tmp_path):
    made = encoder_on(folder_of("bert"), "bert", ConceptForMaskedLM, backbone_train=trained)
    made.save_pretrained(tmp_path / "saved")
    for model in (made, ConceptForMaskedLM.from_pretrained(tmp_path / "saved")):
        backbone = model.encoder.backbone
        layers = {i for i, layer in enumerate(backbone.layers) if all(p.requires_grad for p in layer.parameters())}
        assert layers == free and backbone.embeddings.weight.requires_grad == (trained == "all")
        model.train()
        assert {i for i, layer in enumerate(backbone.layers) if layer.training} == free
        assert backbone.model.embeddings.dropout.training == (trained == "all")
        ids = words(9)[0]
        model(ids[None], labels=ids[None]).loss.backward()
        for name, parameter in backbone.named_parameters():
            is_there = parameter.grad is not None and parameter.grad.abs().sum() > 0
            assert is_there == parameter.requires_grad or ".key.bias" in name or "position" in name, name
        assert not model.eval().encoder.backbone.model.training


def test_its_own_checkpointing(folder_of):
    """The same gradients from less than half of what is kept for them."""
    gradients, kept = [], []
    for asked in (False, True):
        encoder = encoder_on(folder_of("qwen3"), "qwen3", backbone_train="all")
        if asked:
            encoder.backbone.model.activation_checkpointing_enable()
        sizes = {}

        def save(x, sizes=sizes):
            sizes[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
            out = encoder.train()(packed=pack(words(30, 8))).last_hidden_state
        weights = {parameter.untyped_storage()._cdata for parameter in encoder.parameters()}
        kept.append(sum(size for key, size in sizes.items() if key not in weights))
        out.square().sum().backward()
        gradients.append(encoder.backbone.layers[0].mlp.up_proj.weight.grad)
    assert kept[1] < 0.5 * kept[0]
    assert gradients[0].abs().max() > 0 and torch.allclose(*gradients, rtol=1e-4, atol=1e-7)


# --- folders


@pytest.mark.parametrize("family", FAMILIES)
def test_one_folder_holds_everything(family, folder_of, tmp_path):
    """Saved and loaded without its source, bit by bit, also by AutoModel."""
    folder = folder_of(family)
    encoder = encoder_on(folder, family, backbone_layers=[0, 3], **STATE)
    encoder.backbone.calibrate(pack(words(50)))
    packed = pack(words(33, 4))
    expected = encoder(packed=packed)
    encoder.save_pretrained(tmp_path / "ours")
    for file in folder.iterdir():
        file.unlink()
    for again in (ConceptEncoder.from_pretrained(tmp_path / "ours"), AutoModel.from_pretrained(tmp_path / "ours")):
        got = again.eval()(packed=packed)
        assert torch.equal(got.last_hidden_state, expected.last_hidden_state)
        assert torch.equal(got.pooler_output, expected.pooler_output)
        assert again.config.backbone["sha256"] == encoder.config.backbone["sha256"]


def test_a_token_that_was_added_has_a_row(folder_of):
    """A causal model gets [MASK] behind its vocabulary."""
    folder = folder_of("llama")
    encoder = encoder_on(folder, "llama", vocab_size=61, mask_token_id=60)
    table, theirs = encoder.backbone.embeddings.weight, AutoModel.from_pretrained(folder).embed_tokens.weight
    assert torch.equal(table[:60], theirs) and torch.allclose(table[60], theirs.mean(0))


def test_where_it_comes_from(folder_of):
    folder = folder_of("bert")
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n")
    found = describe(folder)
    assert (found["name"], found["license"], found["revision"]) == ("bert", "apache-2.0", None)
    assert len(found["sha256"]) == 64 and describe(folder, name="a/b")["name"] == "a/b"


@pytest.mark.parametrize("change, found", [
    (dict(backbone_layers=5), "backbone_layers: expected up to 4, or rising numbers of its layers, 0 to 3, got 5"),
    (dict(backbone_layers=[0, 4]), "backbone_layers: expected up to 4"),
    (dict(backbone_layers=[2, 1]), "backbone_layers: expected a whole number, or rising ones, or nothing, got [2, 1]"),
    (dict(backbone_window=41), "backbone_window: expected 3 to 40, for which the backbone has positions, got 41"),
    (dict(backbone_window=2), "backbone_window: expected 3 to 40"),
    (dict(backbone_overlap=8), "backbone_overlap: expected 0 to 7"),
    (dict(backbone_train="last 5"), "backbone_train: expected none, all, or last 1 to last 4, got 'last 5'"),
    (dict(backbone_train="some"), "backbone_train: expected none"),
    (dict(backbone_two_sided=True), "backbone_two_sided: expected false with bert"),
    (dict(num_token_layers=1), "num_token_layers: expected 0 with a backbone"),
    (dict(token_dim=32), "token_dim: expected the backbone's width 24"),
    (dict(vocab_size=59), "vocab_size: expected at least the backbone's 60"),
    (dict(init_queries="state"), "hidden_size: expected the backbone's width 24"),
    (dict(backbone=None, init_queries="state"), "init_queries: expected other than state without a backbone"),
    (dict(backbone="a/b"), "backbone: expected what backbone_source.describe makes"),
    (dict(backbone={"config": {"model_type": "gpt2"}}), "backbone: expected a model of type bert, "),
])  # fmt: skip
def test_what_does_not_fit(change, found, folder_of):
    fields = {**OURS, "backbone": described(folder_of("bert"), "bert"), **change}
    with pytest.raises(ValueError) as caught:
        ConceptConfig(**fields)
    assert str(caught.value).startswith(found) and "\n" not in str(caught.value)


def test_positions_behind_the_padding_count_less(folder_of):
    folder = folder_of("roberta")
    with pytest.raises(ValueError, match="backbone_window: expected 3 to 38"):
        ConceptConfig(**{**OURS, "backbone": described(folder, "roberta"), "backbone_window": 39})


def test_folders_that_are_no_backbone(folder_of, tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        describe(tmp_path / "nowhere")
    folder = folder_of("bert")
    config = (folder / "config.json").read_text()
    own_code = config.replace('"model_type"', '"auto_map": {"AutoModel": "x.Y"}, "model_type"')
    (folder / "config.json").write_text(own_code)
    with pytest.raises(ValueError, match="code of its own"):
        describe(folder)
    (folder / "config.json").write_text(config)
    other = source("bert", num_hidden_layers=3)
    other.save_pretrained(tmp_path / "short")
    encoder = encoder_on(folder, "bert")
    (tmp_path / "short" / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"weights are missing, encoder\.layer\.3"):
        load(encoder.backbone, tmp_path / "short", None)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"expected model\.safetensors"):
        describe(folder)


# --- the real one


def test_real_weights():
    """all-MiniLM-L6-v2: the library's states, its special tokens, and its pooling without them."""
    folder = os.environ.get("CONCEPTRON_REAL_WEIGHTS")
    if not folder or not (Path(folder) / "model.safetensors").is_file():
        pytest.skip("CONCEPTRON_REAL_WEIGHTS names no folder of all-MiniLM-L6-v2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = describe(folder, tokenizer)
    assert (found["prefix"], found["suffix"]) == ([101], [102])
    assert found["sha256"] == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    config = ConceptConfig(
        vocab_size=30522, hidden_size=384, num_concepts=16, num_hidden_layers=1, num_attention_heads=6, backbone=found,
        intermediate_size=768, init_queries="state",
    )  # fmt: skip
    encoder = ConceptEncoder(config).eval()
    load(encoder.backbone, folder, None)
    theirs = AutoModel.from_pretrained(folder).eval()
    texts = ["A man is playing a guitar.", "Concepts read tokens, and a decoder reads concepts."]
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            expected = theirs(ids).last_hidden_state[0, 1:-1]
            output = encoder(input_ids=ids)
            assert (encoder.backbone(pack([ids[0, 1:-1]])) - expected).abs().max() < 1e-5
            assert (output.pooler_output[0] - expected.mean(0)).abs().max() < 1e-5


def test_packed_states_move_with_the_batch():
    packed = pack(words(3))._replace(states=torch.ones(3, 2))
    assert isinstance(packed, Packed) and packed.to("meta").states.device.type == "meta"


def test_a_frozen_backbone_builds_no_graph(folder_of):
    encoder = encoder_on(folder_of("bert"), "bert").train()
    assert isinstance(encoder.backbone, Backbone) and not encoder.backbone(pack(words(5))).requires_grad
    assert encoder(packed=pack(words(5))).last_hidden_state.requires_grad


def test_rows_are_as_large_as_row_scale_says(folder_of):
    for row_scale in (0.5, 1.5):
        encoder = encoder_on(folder_of("bert"), "bert", **STATE, num_concepts=16, row_scale=row_scale)
        assert encoder.concepts.weight.square().mean().sqrt().item() == pytest.approx(row_scale, rel=0.05)
        assert encoder.concepts.weight.mean(0).abs().max() < 1e-6
