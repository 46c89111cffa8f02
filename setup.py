"""The repository root is the package `conceptron`; this names its folders. Everything else is in pyproject.toml.

For setuptools the package lies in PACKAGES, where in a checkout a link leads back to the root. An editable install is
then a plain entry of the path, which type checkers and editors follow; the import hook that setuptools otherwise
installs for a package without a folder of its name shows them nothing. An sdist has the package itself there.
"""

from pathlib import Path

from setuptools import setup

PACKAGES = Path(".package")

OPERATORS = [
    "adaln", "bixt_attention", "concept_attention", "linear_cross_entropy", "slot_attention",
    "streamed_attention", "token_attention",
]  # fmt: skip
TASKS = ["tasks", *(f"tasks.{family}" for family in (
    "glue", "longbench", "longbench_e", "retrieval", "scrolls", "sick", "similarity", "synthetic", "zeroscrolls",
))]  # fmt: skip
FOLDERS = [  # tests/test_house.py holds this list against the tree
    "commands", "kernels", *(f"kernels.{operator}" for operator in OPERATORS),
    "models", "models.generation", "models.objectives", "models.start", "models.tasks",
    "engine", "engine.checkpoints", "engine.data", "engine.embedding", "engine.failures", "engine.jobs",
    "engine.labelled", "engine.launching", "engine.optimizing", "engine.recipe",
    "recipes", "recipes.ablation", "recipes.finetune", "recipes.pretrain",
    "bench", "bench.analysis", "bench.analysis.geometry", "bench.documents", "bench.figures", "bench.kernels",
    "bench.measure",
    "bench.downstream", "bench.downstream.answers", "bench.downstream.metrics", *(f"bench.downstream.{tasks}" for tasks
    in TASKS),
]  # fmt: skip

if not (PACKAGES / "conceptron").exists():
    PACKAGES.mkdir(exist_ok=True)
    (PACKAGES / "conceptron").symlink_to("..", target_is_directory=True)

setup(
    script_name=str(PACKAGES / "conceptron" / "setup.py"),  # else a wheel ships this file as conceptron/setup.py
    package_dir={"": str(PACKAGES)},
    packages=["conceptron", *(f"conceptron.{folder}" for folder in FOLDERS)],
    package_data={
        "conceptron": ["py.typed"],
        "conceptron.bench": ["*.yaml"],
        "conceptron.bench.documents": ["*.css", "*.js"],
        "conceptron.kernels": ["*.pyi"],
        "conceptron.recipes": ["*.yaml"],
        "conceptron.recipes.ablation": ["*.yaml"],
        "conceptron.recipes.finetune": ["*.yaml"],
        "conceptron.recipes.pretrain": ["*.yaml"],
        **{f"conceptron.bench.downstream.{tasks}": ["*.yaml"] for tasks in TASKS},
    },
)
