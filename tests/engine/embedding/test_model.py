"""`ConceptModel`: vectors of texts, and the characters that concepts stand for."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from conceptron import ConceptModel
from conceptron.engine.embedding import model as room
from conceptron.engine.embedding.model import batches, spans_of, unit
from conceptron.engine.errors import InputError
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.packing import pack
from conceptron.models.shares import share_bounds, share_means

TEXTS = ["the encoder reads a text", "token", "the concept reads the token again and again, slowly. " * 9, ""]


def states_of(folder, text) -> np.ndarray:
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return AutoModel.from_pretrained(folder).eval().backbone(pack([ids[0]])).numpy()


def test_vectors_are_the_pooled_concepts_whatever_stands_beside(reader, built, monkeypatch):
    vectors = reader.embed(TEXTS)
    assert vectors.dtype == np.float32 and vectors.shape == (4, 30) and not vectors[3].any()
    words, library = AutoTokenizer.from_pretrained(built), AutoModel.from_pretrained(built).eval()
    for text, vector in zip(TEXTS[:3], vectors, strict=False):
        with torch.no_grad():
            pooled = library(**words(text, return_tensors="pt")).pooler_output[0].numpy()
        np.testing.assert_allclose(vector, pooled / np.linalg.norm(pooled), atol=1e-5)
    monkeypatch.setattr(room, "BATCH_ROWS", 1)
    monkeypatch.setattr(room, "WINDOW_CHARS", 1)
    np.testing.assert_allclose(reader.embed(TEXTS), vectors, atol=1e-5)
    assert reader.embed([]).shape == (0, 30)


def test_an_untrained_concept_is_the_mean_of_the_states_of_its_span(reader, built):
    """70 tokens of one character each under 5 concepts: 14 each, whatever the windows."""
    text = "7391" * 17 + "20"
    (concepts,), (spans,) = reader.concepts([text])
    assert spans.tolist() == [[14 * i, 14 * (i + 1)] for i in range(5)]
    states = states_of(built, text).reshape(5, 14, 30).mean(1)
    np.testing.assert_allclose(concepts, unit(states), atol=1e-4)
    np.testing.assert_allclose(reader.embed_queries([text])[0], unit(states.mean(0)), atol=1e-5)
    np.testing.assert_allclose(reader.embed_queries([text]), reader.embed([text]), atol=1e-4)


def test_layers_that_add_nothing_are_left_out_and_no_others(reader, built, tmp_path):
    """The whole model gives the same concepts; one whose layers have learned keeps them."""
    whole = ConceptForMaskedLM.from_pretrained(built).eval()
    ids = reader.vocabulary.encode(TEXTS[:3])
    with torch.no_grad():
        rows = whole.encoder.as_states(whole.encoder(packed=pack(ids)).last_hidden_state).numpy()
    np.testing.assert_allclose(reader.concepts(TEXTS[:3])[0], unit(rows), atol=1e-6)
    assert len(reader.encoder.layers) == 0
    with torch.no_grad():
        whole.encoder.layers[0].read.out.weight.normal_()
    whole.save_pretrained(tmp_path)
    reader.vocabulary.tokenizer.save_pretrained(tmp_path)
    learned = ConceptModel.from_pretrained(tmp_path, "cpu")
    assert len(learned.encoder.layers) == 1
    assert np.abs(learned.concepts(TEXTS[:1])[0] - reader.concepts(TEXTS[:1])[0]).max() > 0.01


@pytest.mark.parametrize("N, C", [(1, 5), (3, 4), (7, 5), (12, 5), (40, 8), (100, 7)])
def test_bounds_are_the_tokens_that_count(N, C):
    """A share's mean depends on the tokens within its bounds, on all of them, and on no other."""
    x = torch.zeros(N, N)
    x.fill_diagonal_(1.0)
    weights = share_means(x, pack([np.zeros(N, dtype=np.int64)]), C)[0].numpy()
    for row, (begin, end) in zip(weights, share_bounds(N, C), strict=True):
        counts = np.flatnonzero(row > 1e-6)
        assert begin <= counts[0] and counts[-1] < end and end - begin <= len(counts) + 1


def test_spans_of_characters():
    assert spans_of([(0, 3), (3, 7), (8, 9), (9, 12)], 1).tolist() == [[0, 12]]
    assert spans_of([(0, 2), (3, 5)] * 8, 2)[0].tolist() == [0, 5] and spans_of([], 3).tolist() == [[0, 0]] * 3


def test_short_texts_may_have_fewer_concepts(reader):
    counts = [len(reading.concepts) for reading in reader.read(TEXTS, tokens_per_concept=16)]
    tokens = [len(ids) for ids in reader.vocabulary.encode(TEXTS)]
    assert counts[0] == counts[1] == counts[3] == 1 and tokens[2] > 80 and counts[2] == 5
    assert [reader.num_concepts(n, 64) for n in (0, 64, 65, 128, 129, 300, 10**6)] == [1, 1, 2, 2, 4, 5, 5]


def test_a_batch_has_as_many_concepts_and_a_limit(monkeypatch):
    monkeypatch.setattr(room, "BATCH_ROWS", 20)
    lengths, counts = np.array([3, 30, 4, 3, 9]), np.array([2, 4, 2, 2, 4])
    made = [batch.tolist() for batch in batches(lengths, counts)]
    assert made == [[0, 3, 2], [4], [1]]


def test_similarity_by_hand():
    queries, axes = np.array([[2.0, 0, 0], [0, 3, 4]]), np.eye(3)
    np.testing.assert_allclose(ConceptModel.similarity(queries, axes), [[1, 0, 0], [0, 0.6, 0.8]], atol=1e-6)
    pairs = np.stack([axes[:2], axes[1:]])  # [2, 2, 3]
    np.testing.assert_allclose(ConceptModel.similarity(queries, pairs), [[1, 0], [0.6, 0.8]], atol=1e-6)
    with pytest.raises(ValueError, match=r"expected \[n, d\] and"):
        ConceptModel.similarity(queries, np.eye(4))


def test_what_is_no_model(bert, tmp_path):
    with pytest.raises(InputError, match="a model of type 'bert'; conceptron build makes one"):
        ConceptModel.from_pretrained(bert)
    with pytest.raises(InputError, match=r"no config\.json"):
        ConceptModel.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="--model: /no/where: no such folder"):
        ConceptModel.from_pretrained("/no/where")
