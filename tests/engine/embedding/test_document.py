"""What docs/embedding.md says in Python runs as it stands."""

import re
from pathlib import Path

import pytest

from conceptron.engine.embedding.embed import embed

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[3] / "docs/embedding.md").read_text(), re.DOTALL)


def test_the_blocks_of_the_document_run(built, tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    for name, text in (("a", "the encoder reads"), ("b", "what is asked"), ("c", "the decoder writes")):
        (tmp_path / "texts" / f"{name}.txt").write_text(text)
    embed([str(tmp_path / "texts")], str(built), tmp_path / "vectors.parquet", with_concepts=True)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    reader, multi_vector, duckdb, faiss = BLOCKS
    exec(reader.replace("runs/read/model", str(built)), names)
    assert names["vectors"].shape == (2, 30) and names["concepts"].shape == (2, 5, 30)
    for package, block in (("sentence_transformers", multi_vector), ("duckdb", duckdb), ("faiss", faiss)):
        pytest.importorskip(package, reason=f"{package}: what stands before it in the document did run")
        exec(block, names)
    assert max(names["best"], key=names["best"].get).endswith("b.txt")
