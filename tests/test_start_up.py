"""What an import loads, and that transformers knows the models whichever of the two packages is imported first."""

import subprocess
import sys

import pytest

HEAVY = ("transformers", "deepspeed", "datasets", "matplotlib", "pydantic")
TINY = "vocab_size=50, hidden_size=32, num_attention_heads=2, intermediate_size=32"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_operator_loads_no_model():
    code = "import sys; from conceptron.kernels import concept_attention; print(callable(concept_attention), "
    assert run(f"{code}[name for name in {HEAVY} if name in sys.modules])") == "True []"


def test_the_package_itself_loads_nothing():
    assert run("import sys, conceptron; print('torch' in sys.modules, 'transformers' in sys.modules)") == "False False"


@pytest.mark.parametrize("first", ["import conceptron; import transformers", "import transformers; import conceptron"])
def test_both_orders_of_import_register_the_models(first):
    code = f"""
{first}
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM
config = AutoConfig.for_model("conceptron", {TINY})
print(type(AutoModel.from_config(config)).__name__, type(AutoModelForMaskedLM.from_config(config)).__name__)
"""
    assert run(code) == "ConceptEncoder ConceptForMaskedLM"


def test_every_public_name_is_there_and_listed():
    code = "import conceptron; print([name for name in conceptron.__all__ if getattr(conceptron, name, None) is None])"
    assert run(code) == "[]"
