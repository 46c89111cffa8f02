"""Starting from somebody else's model: equal to transformers' own layers where it says so, and honest where not."""

import os

import numpy as np
import pytest
import torch
from transformers import (
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaModel,
)

from conceptron.models.backbone import backbone_config, init_from_backbone
from conceptron.models.config import ConceptConfig
from conceptron.models.encoder import ConceptEncoder
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.packing import pack

SIZES = dict(
    vocab_size=60, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=80, rms_norm_eps=1e-5,
)  # fmt: skip
OURS = dict(num_concepts=4, num_hidden_layers=2, num_decoder_layers=1, token_window=32)


def scrambled(model: torch.nn.Module) -> torch.nn.Module:
    """Random norms and biases too, which transformers starts at one and zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else 0.15 * noise)
    return model.double().eval()


def llama(**options) -> LlamaForCausalLM:
    return scrambled(LlamaForCausalLM(LlamaConfig(**{**SIZES, "rope_theta": 5000.0, **options})))


def qwen(**options) -> Qwen2ForCausalLM:
    config = Qwen2Config(**{**SIZES, "num_key_value_heads": 1, "rope_theta": 9000.0, **options})
    return scrambled(Qwen2ForCausalLM(config))


def ours(source, kind=ConceptEncoder, layers: int = 2, **changes):
    torch.manual_seed(1)
    return kind(backbone_config(source, layers=layers, **{**OURS, **changes})).double().eval()


def words(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(4, 60, (n,), generator=generator) for n in lengths]


@torch.no_grad()
def two_sided(model, ids: torch.Tensor, num_layers: int) -> torch.Tensor:
    """States [N, w] after some of transformers' own layers, with a mask that hides nothing."""
    x = model.model.embed_tokens(ids)[None]
    positions = torch.arange(len(ids))[None]
    angles = model.model.rotary_emb(x, positions)
    nothing = torch.zeros(1, 1, len(ids), len(ids), dtype=x.dtype)
    for layer in model.model.layers[:num_layers]:
        x = layer(x, attention_mask=nothing, position_embeddings=angles, position_ids=positions)
    return x[0]


@torch.no_grad()
def token_states(encoder: ConceptEncoder, packed) -> torch.Tensor:
    return encoder.token_layers(encoder.embed_tokens(packed.input_ids), packed, encoder.positions)[0]


def check_equal(source, encoder, num_layers: int) -> None:
    """To what transformers leaves of float64: its norms and angles are those of float32."""
    texts = words(13, 1, 32)
    got = token_states(encoder, pack(texts)).split([13, 1, 32])
    for text, states in zip(texts, got, strict=True):
        expected = two_sided(source, text, num_layers)
        assert expected.std() > 0.05 and (states - expected).abs().max() < 1e-5 * expected.abs().max()


# --- the same width


@pytest.mark.parametrize("make", [llama, qwen])
def test_layers_are_those_of_transformers_without_the_mask(make, tmp_path):
    """From a model in memory and from a folder: value by value, and nothing of the rest."""
    source = make()
    encoder = ours(source)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    report = init_from_backbone(encoder, source)
    check_equal(source, encoder, num_layers=2)
    biases = 3 * (make is qwen)
    assert len(report.loaded) == 1 + 2 * (7 + biases) and len(report.mapped) == 2 and report.projected == []
    assert {name.split(".")[0] for name in report.loaded} == {"embed_tokens", "token_layers"}
    assert all(name.endswith("gate_up.weight") for name in report.mapped) and report.kept_variance is None
    left = len(source.state_dict()) - 1 - 2 * (9 + biases)
    assert len(report.skipped) == left and "model.norm.weight" in report.skipped
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]) != (name in report.loaded + report.mapped), name
    source.float().save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    again = ours(tmp_path).float()
    from_folder = init_from_backbone(again, tmp_path, layers=2)
    assert sorted(from_folder.loaded) == sorted(report.loaded)
    assert torch.equal(again.token_layers[1].feed.gate_up.weight, encoder.float().token_layers[1].feed.gate_up.weight)


def test_the_report_can_be_read():
    source = llama()
    report = init_from_backbone(ours(source, layers=3, vocab_size=62), source, layers=2)
    lines = str(report).splitlines()
    assert lines[0] == "backbone: 14 loaded, 3 mapped, 11 skipped"
    assert "  skipped 1 x model.layers.*.mlp.up_proj.weight" in lines
    for note in ("2 rows behind", "token layers 2 to 2 are new", "32 positions to both sides"):
        assert any(line.startswith("  approximate: ") and note in line for line in lines), note


def test_a_masked_language_model_starts_so_with_its_tied_head():
    source = llama()
    model = ours(source, ConceptForMaskedLM, hidden_size=32)
    init_from_backbone(model, source)
    assert model.config.token_dim == 64 and model.config.num_attention_heads == 2
    table = source.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, table) and torch.equal(model.decoder.embed_tokens.weight, table)
    check_equal(source, model.encoder, num_layers=2)
    ids = words(9)[0]
    model(ids[None], labels=ids[None]).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    untied = ours(source, ConceptForMaskedLM, tie_word_embeddings=False)
    assert "decoder.embed_tokens.weight" in init_from_backbone(untied, source).loaded
    assert torch.equal(untied.decoder.embed_tokens.weight, table) and not torch.equal(untied.lm_head.weight, table)


def test_a_real_model():
    root = os.environ.get("CONCEPTRON_DATA")
    folder = f"{root}/models/stories260k-llama"
    if not root or not os.path.isdir(folder):
        pytest.skip("CONCEPTRON_DATA names no folder with models/stories260k-llama")
    source = LlamaForCausalLM.from_pretrained(folder).double().eval()
    encoder = ours(folder, layers=5)
    report = init_from_backbone(encoder, folder)
    check_equal(source, encoder, num_layers=5)
    assert len(report.loaded) == 1 + 5 * 7 and report.skipped == ("model.norm.weight",)
    narrow = ours(folder, layers=5, token_dim=48)
    report = init_from_backbone(narrow, folder)
    assert 0.75 < report.kept_variance < 1
    text = words(32)[0]
    expected, got = two_sided(source, text, 1), token_states(narrow, pack([text]))
    table, kept = source.model.embed_tokens.weight, narrow.embed_tokens.weight
    back = got @ torch.linalg.lstsq(kept, table).solution  # the directions, found again from the two tables
    assert torch.nn.functional.cosine_similarity(back, expected, dim=-1).mean() > 0.5


def test_shapes_of_known_models():
    """Configurations from names alone: the weights of these have no memory."""
    with torch.device("meta"):
        smol = LlamaForCausalLM(LlamaConfig(
            vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
            intermediate_size=1536, rms_norm_eps=1e-5, rope_theta=1e5, max_position_embeddings=8192,
        ))  # fmt: skip
        qwen25 = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=151936, hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
            intermediate_size=4864, rope_theta=1e6,
        ))  # fmt: skip
        same = ConceptEncoder(backbone_config(smol, num_hidden_layers=1))
    layer = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576
    assert layer == sum(p.numel() for p in smol.model.layers[0].parameters()) == 3_540_096
    assert sum(p.numel() for p in same.token_layers.parameters()) == 4 * layer
    wider, narrow = backbone_config(smol, hidden_size=1024), backbone_config(qwen25, layers=30, token_dim=512)
    assert (wider.token_dim, wider.num_attention_heads, wider.num_key_value_heads) == (576, 16, 16)
    assert (wider.token_num_attention_heads, wider.token_num_key_value_heads, wider.rope_theta) == (9, 3, 1e5)
    assert (narrow.hidden_size, narrow.num_token_layers, narrow.rope_theta) == (512, 24, 1e6)
    assert narrow.token_attention_bias and not wider.token_attention_bias
    assert (narrow.token_num_attention_heads, narrow.token_num_key_value_heads, narrow.token_head_dim) == (8, 8, 64)


# --- other widths, heads and vocabularies


def in_a_subspace(source, width: int, silent: list[int]):
    """The backbone with a stream that never leaves ``width`` directions, and heads that write nothing."""
    size, head_dim = source.config.hidden_size, source.config.hidden_size // source.config.num_attention_heads
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(size, width, dtype=torch.float64, generator=generator))[0]
    inside = basis @ basis.T
    with torch.no_grad():
        source.model.embed_tokens.weight.copy_(source.model.embed_tokens.weight @ inside)
        for layer in source.model.layers:
            for head in silent:
                layer.self_attn.o_proj.weight[:, head * head_dim : (head + 1) * head_dim] = 0
            layer.self_attn.o_proj.weight.copy_(inside @ layer.self_attn.o_proj.weight)
            layer.mlp.down_proj.weight.copy_(inside @ layer.mlp.down_proj.weight)
    return source


@pytest.mark.parametrize("make, heads, groups, width, silent", [
    (llama, 4, 4, 48, [1]),
    (llama, 9, 3, 64, [4]),  # SmolLM2-135M's 576 -> 512, an eighth as wide
    (qwen, 14, 2, 64, [0, 3, 5, 8, 9, 13]),  # Qwen2.5-0.5B's 896 -> 512, likewise
])  # fmt: skip
def test_a_projection_keeps_what_lies_in_it(make, heads, groups, width, silent):
    """Exact where the stream lies in the directions that stay, and the heads that go are silent."""
    sizes = dict(hidden_size=heads * width // (heads - len(silent)), vocab_size=90, rms_norm_eps=1e-12)
    # no eps: it stands beside a mean square, which grows by w / e
    source = in_a_subspace(make(**sizes, num_attention_heads=heads, num_key_value_heads=groups), width, silent)
    encoder = ours(source, token_dim=width, norm_eps=1e-12)
    kept = [head for head in range(heads) if head not in silent]
    assert encoder.config.token_num_attention_heads == encoder.config.token_num_key_value_heads == len(kept)
    report = init_from_backbone(encoder, source)
    assert report.kept_variance == pytest.approx(1.0, abs=1e-12) and len(report.projected) == 1 + 2 * 6
    assert sum(f"keeps heads {kept} of {heads}" in note for note in report.approximate) == 2
    text = words(32)[0]
    expected, got = two_sided(source, text, 2), token_states(encoder, pack([text]))
    table, theirs = encoder.embed_tokens.weight, source.model.embed_tokens.weight
    for ours_of, theirs_of in ((got @ got.T, expected @ expected.T), (got @ table.T, expected @ theirs.T)):
        assert (ours_of - theirs_of).abs().max() < 1e-5 * theirs_of.abs().max()


def test_kept_variance_is_that_of_the_singular_values():
    source = llama()
    with torch.no_grad():
        source.model.embed_tokens.weight *= torch.linspace(0.1, 3, 64, dtype=torch.float64)
    encoder = ours(source, token_dim=32)
    report = init_from_backbone(encoder, source)
    values = np.linalg.svd(source.model.embed_tokens.weight.detach().numpy(), compute_uv=False) ** 2
    assert report.kept_variance == pytest.approx(values[:32].sum() / values.sum(), rel=1e-9) and values[:32].sum() > 0
    norms = encoder.embed_tokens.weight.norm(dim=0) ** 2
    assert torch.allclose(norms, torch.from_numpy(values[:32]), rtol=1e-8)  # one column a direction, strongest first
    assert f"{report.kept_variance:.1%} of the embeddings' variance kept" in str(report)
    assert (encoder(packed=pack(words(9, 0, 3))).last_hidden_state).isfinite().all()


def test_grouped_heads_can_become_full_ones():
    """4 heads in 2 groups -> 4 of their own: the same function. Fewer heads: those that write most, whole groups."""
    source = llama()
    encoder = ours(source, token_num_key_value_heads=4)
    report = init_from_backbone(encoder, source)
    check_equal(source, encoder, num_layers=2)
    assert not any("keeps heads" in note for note in report.approximate)
    with torch.no_grad():
        source.model.layers[0].self_attn.o_proj.weight[:, :32] *= 0.01  # the first group hardly writes
        source.model.layers[1].self_attn.o_proj.weight[:, 16:32] *= 0.01  # the second head
        source.model.layers[1].self_attn.o_proj.weight[:, 48:] *= 0.01  # and the fourth
    for kv_heads, kept in ((1, ("[2, 3]", "[0, 1]")), (2, ("[2, 3]", "[0, 2]"))):
        narrow = ours(source, token_dim=32, token_num_key_value_heads=kv_heads)
        notes = "\n".join(init_from_backbone(narrow, source).approximate)
        assert f"token layer 0 keeps heads {kept[0]} of 4" in notes
        assert kv_heads == 1 or f"token layer 1 keeps heads {kept[1]} of 4" in notes


def test_rows_are_found_by_token():
    source = llama()
    theirs = {f"w{i}": i for i in range(60)}
    vocabulary = {"[PAD]": 0, "[MASK]": 1, **{f"w{2 * i}": i + 2 for i in range(20)}, "new": 22}
    encoder = ours(source, vocab_size=24)
    report = init_from_backbone(encoder, source, vocabulary=vocabulary, source_vocabulary=theirs)
    table, rows = source.model.embed_tokens.weight, encoder.embed_tokens.weight
    assert torch.equal(rows[2:22], table[0:40:2])
    assert torch.allclose(rows[[0, 1, 22, 23]], table.mean(0).expand(4, -1), atol=1e-12)
    assert "embed_tokens.weight" in report.mapped and "20 of 24 rows found by token" in str(report)
    longer = ours(source, vocab_size=62)
    init_from_backbone(longer, source)
    assert torch.equal(longer.embed_tokens.weight[:60], table)
    assert torch.allclose(longer.embed_tokens.weight[60:], table.mean(0).expand(2, -1), atol=1e-12)


def test_concepts_can_start_by_reading_like_a_layer():
    """Query, key and value see tokens through another norm, whose weight is then in the matrices."""
    source = qwen(num_key_value_heads=2)
    encoder = ours(source)
    report = init_from_backbone(encoder, source, read_layer=1)
    x = torch.randn(5, 64, dtype=torch.float64)
    for i in range(2):
        ours_i, theirs = encoder.layers[i], source.model.layers[1 + i]
        plain = torch.nn.functional.rms_norm(x, (64,), eps=1e-5)
        normal, fed = theirs.input_layernorm(x), theirs.post_attention_layernorm(x)
        read, attention = ours_i.read, theirs.self_attn
        for matrix, ours_of in (
            (attention.q_proj.weight, read.query.project), (attention.k_proj.weight, read.key.project),
            (attention.v_proj.weight, read.value),
        ):  # fmt: skip
            assert torch.allclose(ours_of(plain), normal @ matrix.T, atol=1e-5)
        assert torch.equal(ours_i.read.out.weight, theirs.self_attn.o_proj.weight)
        assert torch.allclose(ours_i.feed(ours_i.feed_norm(x)), theirs.mlp(fed), atol=1e-5)
    assert "layers.1.read.query.project.weight" in report.mapped
    assert any("without biases" in note for note in report.approximate)
    assert encoder(packed=pack(words(9, 4))).last_hidden_state.isfinite().all()


# --- BERT


def bert(kind=BertModel, eps: float = 1e-6, **options):
    sizes = {name: value for name, value in SIZES.items() if name not in ("num_key_value_heads", "rms_norm_eps")}
    config = kind.config_class(**sizes, layer_norm_eps=eps, max_position_embeddings=40, **options)
    model = scrambled(kind(config, add_pooling_layer=False))
    with torch.no_grad():  # as small as such embeddings are
        for table in (model.embeddings.word_embeddings, model.embeddings.position_embeddings):
            table.weight.mul_(0.3)
    return model


def test_the_first_attention_of_bert_is_the_same():
    """Queries, keys, values and what they write up to scale, through LayerNorm's centring and shift and the biases."""
    source, text = bert(), words(12)[0]
    encoder = ours(source)
    assert encoder.config.token_positions == "learned" and encoder.config.max_position_embeddings == 40
    report = init_from_backbone(encoder, source)
    layer = encoder.token_layers[0]
    rows = encoder.positions(encoder.embed_tokens(text), torch.arange(12), 12)
    states = layer.attention_norm(rows)
    self_attention = source.encoder.layer[0].attention.self
    normal = source.embeddings(text[None])[0]
    for name in ("query", "key"):
        ours_of, theirs_of = getattr(layer.attention, name), getattr(self_attention, name)
        assert torch.allclose(ours_of(states), theirs_of(normal), atol=1e-9)
    context = self_attention(normal[None])[0][0]
    written = context @ source.encoder.layer[0].attention.output.dense.weight.T
    written = (written - written.mean(-1, keepdim=True)) * encoder.embed_tokens.weight.square().mean().sqrt()
    _, places = encoder.token_layers(rows, pack([text]), encoder.positions)
    got = layer.attention(states, None, places)
    assert torch.allclose(got, written, atol=1e-9)
    assert any("first attention alone is the same" in note for note in report.approximate)
    assert any("attention.output.dense.bias has no counterpart" in note for note in report.approximate)
    assert not any("feed." in name for name in report.loaded + report.mapped)
    assert "token_layers.1.attention_norm.weight" in report.loaded
    assert torch.equal(
        encoder.token_layers[1].attention_norm.weight, source.encoder.layer[0].output.LayerNorm.weight
    )


def test_bert_at_another_width_and_roberta():
    """Queries of the heads that stay, where centred embeddings lie in 48 directions; positions from behind padding."""
    source, text = bert(RobertaModel, eps=1e-12, pad_token_id=1), words(12)[0]
    basis = torch.randn(64, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    basis = torch.linalg.qr(basis - basis.mean(0))[0]
    with torch.no_grad():
        tables = source.embeddings
        for table in (tables.word_embeddings, tables.position_embeddings, tables.token_type_embeddings):
            table.weight.copy_(table.weight @ basis @ basis.T)
    encoder = ours(source, token_dim=48, norm_eps=1e-12)
    assert encoder.config.max_position_embeddings == 38
    report = init_from_backbone(encoder, source, layers=1)
    assert report.kept_variance == pytest.approx(1.0, abs=1e-12) and "positions.table.weight" in report.projected
    (note,) = [note for note in report.approximate if "keeps heads" in note]
    kept = [int(head) for head in note[note.index("[") + 1 : note.index("]")].split(",")]
    normal = source.embeddings(text[None])[0]
    expected = source.encoder.layer[0].attention.self.query(normal).unflatten(-1, (4, 16))[:, kept].flatten(1)
    layer = encoder.token_layers[0]
    rows = encoder.positions(encoder.embed_tokens(text), torch.arange(12), 12)
    assert torch.allclose(layer.attention.query(layer.attention_norm(rows)), expected, atol=1e-6)


# --- what is refused


def test_what_does_not_fit_is_refused(tmp_path):
    source = qwen()
    fitting = backbone_config(source, layers=2, **OURS).to_diff_dict()

    def model(**changes) -> ConceptEncoder:
        return ConceptEncoder(ConceptConfig(**{**fitting, **changes}))

    for options, given, match in (
        ({}, {"layers": 3}, r"layers: expected at most 2 \(num_token_layers\) and 3 \(of the backbone\), got 3"),
        ({"vocab_size": 50}, {}, "vocab_size: expected at least the backbone's 60, got 50"),
        ({"token_attention_bias": False}, {}, "token_attention_bias: expected True, got False"),
        ({"token_intermediate_size": 64}, {}, "token_intermediate_size: expected the backbone's 80, got 64"),
        ({"token_num_attention_heads": 2, "token_num_key_value_heads": 1}, {}, r"token_head_dim: .* 16, got 32"),
        ({"token_dim": 128, "token_num_attention_heads": 8}, {}, "token_dim: expected at most the backbone's width 64"),
        ({"token_mixer": "conv"}, {}, "token_mixer: expected local, got conv"),
        ({}, {"read_layer": 2}, "read_layer: expected 0 to 1"),
        ({"layer_kind": "slot"}, {"read_layer": 0}, "layer_kind: expected cross with read_layer, got slot"),
        ({"hidden_size": 32, "num_attention_heads": 2}, {"read_layer": 0}, "hidden_size: expected token_dim = 64"),
        ({}, {"vocabulary": {"a": 1}}, "expected both vocabulary and source_vocabulary"),
        ({}, {"vocabulary": {"a": 1}, "source_vocabulary": {"b": 1}}, "no token in common"),
    ):
        with pytest.raises(ValueError, match=match) as error:
            init_from_backbone(model(**options), source, **given)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"expected a model of type llama, .*got gpt2"):
        init_from_backbone(model(), GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)))
    with pytest.raises(ValueError, match=r"there is no config\.json"):
        init_from_backbone(model(), tmp_path)
    source.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected model\.safetensors"):
        init_from_backbone(model(), tmp_path)
    bare = torch.nn.Linear(2, 2)
    bare.config = source.config
    with pytest.raises(ValueError, match=r"expected a tensor embed_tokens\.weight, got weight"):
        init_from_backbone(model(), bare)
