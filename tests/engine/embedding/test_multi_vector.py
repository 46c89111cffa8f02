"""The real MultiVectorEncoder of sentence-transformers on a small model."""

import numpy as np
import pytest

library = pytest.importorskip("sentence_transformers", minversion="6.0")

TEXTS = ["the encoder reads a text", "a token of the decoder writes slowly, again and again", "text"]


def test_the_library_s_maxsim_is_ours(reader, tmp_path):
    from conceptron.engine.embedding.multi_vector import multi_vector_encoder

    loaded = multi_vector_encoder(reader)
    assert isinstance(loaded, library.MultiVectorEncoder) and loaded.get_embedding_dimension() == 30
    queries, documents = loaded.encode_query(TEXTS[:2]), loaded.encode_document(TEXTS)
    assert [each.shape for each in queries] == [(1, 30)] * 2 and [each.shape for each in documents] == [(5, 30)] * 3
    want = reader.similarity(reader.embed_queries(TEXTS[:2]), reader.concepts(TEXTS)[0])
    np.testing.assert_allclose(loaded.similarity(queries, documents), want, atol=1e-5)
    with pytest.raises(ValueError, match="copy that"):
        loaded.save(str(tmp_path / "saved"))
