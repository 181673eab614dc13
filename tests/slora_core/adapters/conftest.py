"""A tiny model, and how its adapters lie in pages."""

from pathlib import Path

import pytest

from slora_core.adapters.page_layout import AdapterGeometry
from tests.factories import make_geometry, make_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("adapters") / "model", "qwen3")


@pytest.fixture(scope="module")
def geometry(model_dir: Path) -> AdapterGeometry:
    return make_geometry(model_dir)
