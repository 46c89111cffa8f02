"""Files of figures: whole or not at all, and never a NaN."""

import ast
import json
import math
from pathlib import Path

import pytest

from conceptron.engine import files

ROOT = Path(__file__).parents[2]


def test_what_is_not_finite_is_null_and_named():
    content = {"loss": math.nan, "step": 3, "terms": {"a": 1.5, "b": -math.inf}, "rows": [{"x": math.inf}, {"x": 1.0}],
               "list": (1.0, math.nan)}  # fmt: skip
    text = files.as_json(content)
    assert json.loads(text, parse_constant=pytest.fail) == {
        "loss": None, "step": 3, "terms": {"a": 1.5, "b": None, "not_finite": ["b"]},
        "rows": [{"x": None, "not_finite": ["x"]}, {"x": 1.0}], "list": [1.0, None], "not_finite": ["loss", "list"],
    }  # fmt: skip
    assert files.as_json({"a": [1, 2.5, "b", None, True]}) == '{"a": [1, 2.5, "b", null, true]}'
    assert files.in_words(1.23456, ".2f") == "1.23" and files.in_words(math.nan, ".2f") == "not finite"


def test_every_writer_of_json_refuses_what_is_not_finite():
    """Nobody calls json.dump or json.dumps with its default, which writes a bare NaN."""
    careless = []
    for path in sorted(path for room in ("models", "engine", "bench") for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            is_dump = node.func.attr in ("dump", "dumps") and getattr(node.func.value, "id", "") == "json"
            if is_dump and not any(option.arg == "allow_nan" for option in node.keywords):
                careless.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not careless


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    with pytest.raises(FileNotFoundError):
        files.write_text(tmp_path / "missing" / "x.md", "text")
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
