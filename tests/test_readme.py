"""The README's Python, block after block as a reader types it, beside a small model where `make demo` leaves one."""

import re
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from conceptron.engine.card import About
from conceptron.engine.data import tokenizer as tokenizers
from conceptron.engine.export import export
from conceptron.engine.launching import launch
from conceptron.models.config import ConceptConfig
from conceptron.models.masked_lm import ConceptForMaskedLM

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
TEXT = "Return a new array of given shape and type."


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Path:
    """A fresh folder with runs/demo/model and reader."""
    folder, tokenizer = tmp_path_factory.mktemp("fresh"), tokenizers.train([TEXT] * 9, 300)
    torch.manual_seed(0)
    model = ConceptForMaskedLM(ConceptConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_concepts=8, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=32, num_decoder_layers=1, timestep_conditioning=True, mask_token_id=tokenizer.mask_token_id,
    ))  # fmt: skip
    (folder / "runs" / "demo").mkdir(parents=True)
    with launch.world() as world:
        for place in (folder / "runs" / "demo" / "model", folder / "reader"):
            export(world, model, tokenizer, place, About("demo", 64))
    return folder


def test_the_blocks_run_in_order_and_surprise_nobody(fresh, monkeypatch, caplog):
    """On a CPU where there is no GPU, and without a table of weights that were left in the folder."""
    monkeypatch.chdir(fresh)
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    names: dict = {}
    assert len(BLOCKS) >= 3
    for block in BLOCKS:
        code = block if torch.cuda.is_available() else block.replace('device="cuda"', 'device="cpu"')
        caplog.clear()
        exec(compile(code, f"README.md: {block.splitlines()[0]}", "exec"), names)
        is_encoder = "AutoModel.from_pretrained(" in block
        assert not is_encoder or not [each for each in caplog.records if "UNEXPECTED" in each.getMessage()]
    assert names["out"].shape == (2, 128, 8, 64) and names["out"].isfinite().all()
    assert names["concepts"].shape == (1, 8, 32)
