"""Registration with transformers does not depend on what is imported first."""

import ast
import subprocess
import sys
from pathlib import Path

MODELS = Path(__file__).parents[2] / "models"


def needed_by(name: str) -> set[str]:
    """Files of ``models`` that one of them imports when it is loaded, and what these import, by their names."""
    found: set[str] = set()
    for node in ast.parse((MODELS / f"{name}.py").read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module and "." not in node.module:
            found |= {node.module} | (needed_by(node.module) if node.module not in found else set())
    return found


def test_what_the_configuration_needs_does_not_wait_for_it():
    """AutoConfig loads ``config.py``: a file that both is needed by it and asks for AutoConfig could not come first."""
    files = needed_by("config")
    assert {"auto", "backbone_config", "decisions", "ranges"} <= files
    for name in files:
        for node in ast.parse((MODELS / f"{name}.py").read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module == "transformers":
                assert not [alias.name for alias in node.names if alias.name.startswith("Auto")], name


def test_any_of_them_may_come_first():
    code = "import conceptron.models.backbone_config, transformers; transformers.AutoConfig.for_model('conceptron')"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
