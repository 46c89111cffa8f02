"""The page of a report: complete, alone, and opened in a real browser where there is one."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from conceptron.bench import analyze as report
from conceptron.bench.documents import web
from conceptron.bench.documents.summary import Summary, schema
from conceptron.models.config import ConceptConfig
from conceptron.models.masked_lm import ConceptForMaskedLM

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TEXT = (
    "The <b>reader</b> opens a file & returns its lines one by one. A matrix times a vector is a vector. "
    "If the key is missing the default value is returned instead. Every thread waits until the lock is released.\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The report of an untrained model about a little text, with marks in it that HTML would take for its own."""
    from conceptron.engine.data import tokenizer

    place = tmp_path_factory.mktemp("page")
    words = tokenizer.train([TEXT] * 20, 300)
    tokens = tokenizer.describe(words, "words").tokens
    torch.manual_seed(0)
    model = ConceptForMaskedLM(ConceptConfig(
        vocab_size=tokens.vocab_size, mask_token_id=tokens.mask_id, pad_token_id=0, hidden_size=32, num_concepts=8,
        num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_decoder_layers=1,
    ))  # fmt: skip
    model.save_pretrained(place / "model")
    words.save_pretrained(place / "model")
    for i in range(40):
        (place / f"{i}.txt").write_text(TEXT[i:] + TEXT[: 3 * i])
    return report.analyze(place / "model", [str(place / "*.txt")])


def test_the_page_is_whole_and_alone(folder):
    page = (folder / "page.html").read_text()
    assert page.startswith("<!doctype html>") and page.count("<svg") == 10  # no curve of a training that was not
    for title in ("Is it worth going on?", "What concepts read", "What concepts do", "What can be read off", "Samples"):
        assert title in page
    assert not re.search(r'(src|href)="(?!#|data:)', page), "something would be fetched"
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    ids = re.findall(r'\bid="?([^" >]+)', page)
    assert len(ids) == len(set(ids))
    assert "<b>reader" not in page and "&lt;" in page
    assert page.count("<span data-c=") > 30


def test_the_summary_is_what_its_schema_says(folder):
    Summary.model_validate_json((folder / "summary.json").read_text(), strict=True)
    assert json.loads((folder / "summary.schema.json").read_text()) == json.loads(json.dumps(schema()))


def test_an_inlined_figure_keeps_its_marks():
    svg = '<?xml version="1.0"?>\n<svg width="4pt" height="3pt" viewBox="0 0 4 3"><metadata>x</metadata>'
    svg += '<path id="a"/><use xlink:href="#a"/><g clip-path="url(#a)" width="2"/></svg>\n'
    assert web.inline(svg, "f") == (
        '<svg viewBox="0 0 4 3"><path id="f-a"/><use xlink:href="#f-a"/><g clip-path="url(#f-a)" width="2"/></svg>'
    )
    assert web.table([{"<i>": "<b>", "n": 1.0}]).count("&lt;") == 2


PROBE = """<script>addEventListener("load", () => {
  const token = document.querySelector(".text span"), seen = [...document.querySelectorAll("svg")];
  token.click();
  const picked = document.querySelectorAll(".text span.picked").length;
  const wide = document.documentElement.scrollWidth, drawn = seen.filter((s) => s.getBoundingClientRect().height > 99);
  const says = document.getElementById("who").textContent;
  document.title = JSON.stringify({wide, drawn: drawn.length, picked, says});
});</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1280, 500])  # headless Chromium makes no window under 500
def test_in_a_browser(folder, tmp_path, width):
    page = tmp_path / "page.html"
    page.write_text((folder / "page.html").read_text().replace("</body>", PROBE))
    run = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
           "--host-resolver-rules=MAP * ~NOTFOUND", f"--window-size={width},900", "--dump-dom", page.as_uri()]
    shown = subprocess.run(run, capture_output=True, text=True, timeout=120, check=True).stdout
    found = json.loads(re.search(r"<title>(.*?)</title>", shown)[1].replace("&quot;", '"').replace("&amp;", "&"))
    assert found["wide"] <= width, "the page is wider than its window"
    assert found["drawn"] == 10
    assert found["picked"] >= 1 and "reads it most" in found["says"]
