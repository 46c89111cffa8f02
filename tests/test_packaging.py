"""A wheel carries everything, and a checkout does not get in the way of the Hugging Face package named `kernels`."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python(code: str, cwd: Path, path: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = listing.stdout.splitlines() if listing.returncode == 0 else [
        str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file() and ".venv" not in path.parts
    ]  # fmt: skip
    for name in names:  # a copy, so that building leaves nothing in the checkout
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/", "bench/results/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "-w", folder]
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", *flags, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("conceptron-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_wheel_holds_the_package_and_nothing_else(unpacked):
    names = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert {"conceptron/__init__.py", "conceptron/py.typed", "conceptron/recipes/demo.yaml"} <= names
    assert "conceptron/setup.py" not in names
    assert not any("/tests/" in name for name in names)
    tops = {name.split("/")[0] for name in names}
    assert tops == {"conceptron", next(top for top in tops if top.endswith(".dist-info"))}


def test_wheel_works_from_any_folder(unpacked, tmp_path):
    code = "import conceptron; from conceptron.kernels import merge_partials; print(conceptron.__file__)"
    assert python(code, tmp_path, unpacked).startswith(str(unpacked))
    code = "import sys; from conceptron.__main__ import main; sys.exit(main(['train', 'no/such/recipe.yaml']) != 2)"
    python(code, tmp_path, unpacked)


def test_transformers_imports_inside_the_checkout(tmp_path):
    # the Hugging Face package, as far as transformers asks for it
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("def get_kernel(name): return name\n")
    info = tmp_path / "kernels-99.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 99.0\n")
    code = "from kernels import get_kernel; import sys; assert '' in sys.path; print(get_kernel('found'))"
    assert python(code, ROOT, tmp_path) == "found"
    code = "from transformers import BertConfig; print(BertConfig().model_type)"
    assert python(code, ROOT, Path("")) == "bert"
