"""A registry of real adapters under a root, whose state outlives it."""

from pathlib import Path

import pytest

from app.registry.inspector import AdapterInspector
from app.registry.pools import LivingPools
from app.registry.registry import AdapterRegistry
from app.registry.state_file import StateFile
from slora_core.adapters.page_layout import AdapterGeometry
from tests.factories import make_geometry, make_model, make_random_adapter


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("registry") / "model", "llama")


@pytest.fixture(scope="module")
def geometry(model_dir: Path) -> AdapterGeometry:
    return make_geometry(model_dir)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def add(root: Path, model_dir: Path):
    return lambda name, **options: make_random_adapter(root / name, model_dir, **options)


@pytest.fixture
def make(geometry: AdapterGeometry, root: Path, tmp_path: Path):
    """A registry whose state outlives it."""

    def make_registry(
        geometry=geometry, num_pool_pages=1000, allowed_roots=(root,), pools=None, **options
    ):
        return AdapterRegistry(
            AdapterInspector(geometry, allowed_roots),
            pools or LivingPools(num_pool_pages),
            **{"store": StateFile(tmp_path / "s" / "state"), **options},
        )

    return make_registry
