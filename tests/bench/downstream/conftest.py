"""The real data, where they are at hand: ``shared/data`` beside the checkout or above it, or CONCEPTRON_DATA."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data() -> Path:
    """Skips where there is none."""
    places = [parent / "shared" / "data" for parent in Path(__file__).parents]
    places = [Path(os.environ["CONCEPTRON_DATA"])] if "CONCEPTRON_DATA" in os.environ else places
    found = next((place for place in places if place.is_dir()), None)
    return found or pytest.skip("no shared/data here")


@pytest.fixture(scope="session")
def reference(data) -> Callable[[str], dict]:
    """Inputs and outputs of official metric code, by the name of their file."""

    def read(name: str) -> dict:
        path = data / "metric_references" / f"{name}.json"
        return json.loads(path.read_text()) if path.is_file() else pytest.skip(f"{path} is not here")

    return read
