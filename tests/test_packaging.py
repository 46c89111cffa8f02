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
def source(tmp_path_factory) -> Path:
    """A copy, so that building leaves nothing in the checkout."""
    source = tmp_path_factory.mktemp("checkout") / "source"
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = listing.stdout.splitlines() if listing.returncode == 0 else [
        str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file() and ".venv" not in path.parts
    ]  # fmt: skip
    left = ("tests/bench/", "tests/engine/", "docs/", "bench/results/")
    for name in names:
        if (ROOT / name).is_file() and not name.startswith(left):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    return source


@pytest.fixture(scope="module")
def unpacked(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
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


def test_an_sdist_holds_what_a_wheel_is_built_from(source, tmp_path):
    """No test without the files that it reads."""
    words = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(words, cwd=source, check=True, capture_output=True)
    names = set((tmp_path / "conceptron.egg-info" / "SOURCES.txt").read_text().splitlines())
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert {f".package/conceptron/{name}" for name in ("__init__.py", "py.typed", "recipes/demo.yaml")} <= names
    assert not [name for name in names if "tests/" in name or name.endswith("/setup.py")]


def test_an_editable_install_is_a_folder_that_type_checkers_follow(source, tmp_path):
    code = f"from setuptools.build_meta import build_editable; build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        tops = [name for name in wheel.namelist() if "/" not in name]
        assert tops == ["__editable__.conceptron-0.1.0.pth"], "a path, and no import hook"
        place = Path(wheel.read(tops[0]).decode().strip())
    assert (place / "conceptron").resolve() == source.resolve() and (place / "conceptron" / "py.typed").is_file()
    can_import = {path.name for path in place.iterdir()} - {"conceptron.egg-info"}
    assert can_import == {"conceptron"}, "nothing else comes onto the path"
    assert python("import conceptron; print(conceptron.__version__)", tmp_path, place) == "0.1.0"


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
