"""Checkpoints loaded with another number of concepts, or with more learned positions than they have."""

import logging

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForMaskedLM

from conceptron.models.config import ConceptConfig
from conceptron.models.decisions import CHOICES
from conceptron.models.encoder import ConceptEncoder
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.packing import pack
from conceptron.models.pretrained import ConceptPreTrainedModel
from conceptron.models.start.resize import corner_places, part_places, resize, resized

OWN_QUERIES = [kind for kind in CHOICES["init_queries"] if kind != "state"]  # that needs a backbone

SMALL = dict(
    vocab_size=60, hidden_size=32, num_concepts=6, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
    num_decoder_layers=1, max_position_embeddings=16,
)  # fmt: skip


def saved(folder, kind: type = ConceptForMaskedLM, **options) -> ConceptPreTrainedModel:
    torch.manual_seed(0)
    model = kind(ConceptConfig(**{**SMALL, **options})).eval()
    model.save_pretrained(folder)
    return model


def differing(a: nn.Module, b: nn.Module) -> set[str]:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    return {name for name in ours if not torch.equal(ours[name], theirs[name])}


@pytest.mark.parametrize("old, new", [(6, 6), (6, 12), (12, 6), (5, 7), (7, 3), (9, 1), (2, 40)])
def test_places_against_numpy(old, new):
    """Corners: ends stay. Parts: middles of equal parts, linear beyond the outer two."""
    corners, parts = corner_places(old, new).numpy(), part_places(old, new).numpy()
    np.testing.assert_allclose(corners, np.linspace(0, old - 1, new), atol=1e-12)
    np.testing.assert_allclose((parts + 0.5) / old, (np.arange(new) + 0.5) / new, atol=1e-12)
    values = torch.randn(old, 3, dtype=torch.float64)
    stretched = resize(values, torch.Size([new, 3]), ("positions",), "x")
    expected = [np.interp(corners, np.arange(old), values[:, j].numpy()) for j in range(3)]
    np.testing.assert_allclose(stretched.numpy(), np.stack(expected, 1), atol=1e-12)
    if old == new:
        assert torch.equal(resize(values, values.shape, ("concepts",), "x"), values)
    line = torch.arange(old, dtype=torch.float64)[:, None] * 2 + 1  # a straight line stays one, ends included
    on_line = resize(line, torch.Size([new, 1]), ("concepts",), "x")
    np.testing.assert_allclose(on_line[:, 0].numpy(), parts * 2 + 1, atol=1e-12)


def test_both_dimensions_of_a_table_may_follow():
    rows, columns = torch.arange(4.0)[:, None], torch.arange(3.0) * 10
    resized_table = resize(rows + columns, torch.Size([7, 6]), ("positions", "concepts"), "x")
    expected = torch.arange(7.0)[:, None] / 2 + (torch.arange(6.0) / 2 - 0.25) * 10
    assert torch.allclose(resized_table, expected)


@pytest.mark.parametrize("init", OWN_QUERIES)
@pytest.mark.parametrize("new", [3, 11, 24])
def test_concepts_change_at_load(init, new, tmp_path):
    """Rows stay as long as they were and distinct; everything else is copied bit for bit; the model works."""
    model = saved(tmp_path, init_queries=init, concept_positions="learned")
    loaded = ConceptForMaskedLM.from_pretrained(tmp_path, num_concepts=new)
    assert loaded.config.num_concepts == new and not loaded.training
    changed = {"encoder.concepts.places"}
    if init != "anchor":
        changed.add("encoder.concepts.weight")
        rows, before = loaded.encoder.concepts.weight, model.encoder.concepts.weight
        where = part_places(6, new).numpy().clip(0, 5)
        norms = np.interp(where, np.arange(6), before.detach().norm(dim=1).numpy())
        np.testing.assert_allclose(rows.detach().norm(dim=1).numpy(), norms, rtol=1e-5)
        assert torch.pdist(nn.functional.normalize(rows.detach(), dim=1)).min() > 0.05
    assert differing(loaded, model) == changed
    assert loaded.lm_head.weight is loaded.encoder.embed_tokens.weight  # still tied
    out = loaded(torch.randint(4, 60, (2, 9)))
    assert out.concepts.shape == (2, new, 32) and out.logits.isfinite().all()
    loaded.save_pretrained(tmp_path / "again")
    assert differing(ConceptForMaskedLM.from_pretrained(tmp_path / "again"), loaded) == set()


@pytest.mark.parametrize("init", ["orthogonal", "segment"])
def test_new_rows_of_a_new_model_keep_norm_sqrt_d_and_their_neighbors(init, tmp_path):
    rows = saved(tmp_path, ConceptEncoder, init_queries=init).concepts.weight.detach()
    loaded = ConceptEncoder.from_pretrained(tmp_path, num_concepts=12).concepts.weight.detach()
    assert torch.allclose(loaded.norm(dim=1), torch.full((12,), 32**0.5), rtol=1e-5)
    between = 0.75 * rows[2] + 0.25 * rows[3]  # concept 5 of 12 stands at 11/24, a quarter of the way from 2 to 3
    assert torch.allclose(loaded[5], between * 32**0.5 / between.norm(), atol=1e-5)


def test_an_unchanged_size_is_an_exact_copy(tmp_path):
    model = saved(tmp_path, token_positions="learned", concept_positions="learned")
    same = ConceptForMaskedLM.from_pretrained(tmp_path, num_concepts=6, max_position_embeddings=16)
    assert differing(same, model) == set()
    assert resized(model, num_concepts=6) is model


@pytest.mark.parametrize("auto, kind", [(AutoModel, ConceptEncoder), (AutoModelForMaskedLM, ConceptForMaskedLM)])
def test_by_way_of_auto_classes_and_configurations(auto, kind, tmp_path):
    """Sizes in keywords, in a configuration, and an encoder out of a whole model's checkpoint."""
    saved(tmp_path, concept_positions="none")
    by_keyword = auto.from_pretrained(tmp_path, num_concepts=9)
    config = ConceptConfig.from_pretrained(tmp_path, num_concepts=9)
    by_config = kind.from_pretrained(tmp_path, config=config)
    assert type(by_keyword) is kind and by_keyword.config.num_concepts == by_config.config.num_concepts == 9
    assert differing(by_keyword, by_config) == set() and config.num_concepts == 9
    whole = ConceptForMaskedLM.from_pretrained(tmp_path, num_concepts=9)
    encoder = by_config if kind is ConceptEncoder else by_config.encoder
    assert differing(encoder, whole.encoder) == set()


def test_weights_without_a_configuration_load_as_they_are(tmp_path):
    model = saved(tmp_path)
    (tmp_path / "config.json").unlink()
    assert differing(ConceptForMaskedLM.from_pretrained(tmp_path, config=model.config), model) == set()
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        ConceptForMaskedLM.from_pretrained(tmp_path, config=ConceptConfig(**{**SMALL, "num_concepts": 9}))


def test_sharded_half_precision_and_loading_report(tmp_path):
    model = saved(tmp_path)
    model.bfloat16().save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    loaded, report = ConceptForMaskedLM.from_pretrained(tmp_path / "shards", num_concepts=8, output_loading_info=True)
    assert loaded.dtype == torch.bfloat16 and loaded.encoder.concepts.weight.shape == (8, 32)
    assert not report["missing_keys"] and not report["mismatched_keys"]


def test_learned_positions_are_stretched_and_keep_their_ends(tmp_path):
    model = saved(tmp_path, token_positions="learned", decoder_queries="position", token_dim=16)
    loaded = ConceptForMaskedLM.from_pretrained(tmp_path, max_position_embeddings=61)
    for old, new in ((model.encoder, loaded.encoder), (model.decoder, loaded.decoder)):
        old, new = old.positions.table.weight, new.positions.table.weight
        assert new.shape == (61, old.shape[1])
        assert torch.equal(new[0], old[0]) and torch.equal(new[-1], old[-1]) and torch.equal(new[::4], old)
        assert torch.allclose(new[1], 0.75 * old[0] + 0.25 * old[1], atol=1e-6)
    long = torch.randint(4, 60, (1, 61))
    assert loaded(long).logits.isfinite().all()
    with pytest.raises(ValueError, match="61 tokens is longer"):
        model(long)


def test_what_was_resized_is_said_in_one_line(tmp_path, caplog):
    saved(tmp_path, token_positions="learned")
    logging.getLogger("transformers").propagate = True
    for folder_options, expected in (
        (dict(num_concepts=8), "num_concepts 6 -> 8: encoder.concepts.weight [6, 32] -> [8, 32]"),
        (
            dict(max_position_embeddings=20),
            "max_position_embeddings 16 -> 20: encoder.positions.table.weight [16, 32] -> [20, 32], "
            "decoder.positions.table.weight [16, 32] -> [20, 32]",
        ),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            ConceptForMaskedLM.from_pretrained(tmp_path, **folder_options)
        assert [r.getMessage() for r in caplog.records if "resized" in r.getMessage()] == [f"resized for {expected}"]


class Counting(ConceptPreTrainedModel):
    """A model with a parameter that follows C in a way that nobody wrote down."""

    def __init__(self, config: ConceptConfig):
        super().__init__(config)
        self.encoder = ConceptEncoder(config)
        self.of_concepts = nn.Linear(config.num_concepts, 2)
        self.post_init()


def test_what_cannot_be_resized_is_refused_with_the_reason(tmp_path):
    saved(tmp_path / "counting", Counting)
    with pytest.raises(ValueError, match=r"of_concepts.weight \[2, 6\] -> \[2, 8\] cannot be resized: nothing"):
        Counting.from_pretrained(tmp_path / "counting", num_concepts=8)
    saved(tmp_path / "one", num_concepts=1)
    with pytest.raises(ValueError, match=r"num_concepts 1 -> 4: .*concepts.weight.* cannot be resized: one row has"):
        ConceptForMaskedLM.from_pretrained(tmp_path / "one", num_concepts=4)
    saved(tmp_path / "anchor", num_concepts=1, init_queries="anchor")  # nothing of it is a row
    assert ConceptForMaskedLM.from_pretrained(tmp_path / "anchor", num_concepts=4).config.num_concepts == 4
    with pytest.raises(ValueError, match="num_concepts: expected a whole number from 1, got 0"):
        ConceptForMaskedLM.from_pretrained(tmp_path / "one", num_concepts=0)
    with pytest.raises(ValueError, match="rope_factor: expected 1 with rope_extension = none"):
        ConceptForMaskedLM.from_pretrained(tmp_path / "one", rope_factor=4.0)
    model = ConceptEncoder(ConceptConfig(**SMALL))
    next(model.parameters()).ds_id = 0
    with pytest.raises(ValueError, match="ZeRO-3 has partitioned the model"):
        resized(model, num_concepts=3)


def test_concepts_of_another_number_say_nearly_the_same(tmp_path):
    """Segments and anchors follow the text: twice the concepts of a new model lie near those they came from."""
    model = saved(tmp_path, ConceptEncoder, num_concepts=8)
    twice = ConceptEncoder.from_pretrained(tmp_path, num_concepts=16)
    batch = pack([torch.randint(4, 60, (64,)) for _ in range(4)])
    with torch.no_grad():
        few, many = (nn.functional.normalize(m(packed=batch).last_hidden_state, dim=-1) for m in (model, twice))
    nearest = (many @ few.mT).argmax(-1)  # [B, 16]
    assert (nearest == torch.arange(16) // 2).float().mean() > 0.9
