"""Fixtures of the tests on a GPU: a tiny model, its adapters, engines that know them."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slora_core.adapters.peft_weights import load_packed_adapter
from slora_core.config import EngineConfig
from slora_core.engine.engine import Engine
from tests.factories import make_adapter, make_model
from tests.gpu.cases import ADAPTERS
from tests.oracle import GreedyOracle


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("gpu") / "model", "llama", seed=3)


@pytest.fixture(scope="session")
def oracle(model_dir: Path) -> GreedyOracle:
    adapters = {
        kind: make_adapter(model_dir.parent / kind, model_dir, seed=index, **options)
        for index, (kind, options) in enumerate(ADAPTERS.items())
    }
    return GreedyOracle(model_dir, adapters, ignore_eos=True)


@pytest.fixture
def make_engine(model_dir: Path, oracle: GreedyOracle) -> Iterator[Callable[..., Engine]]:
    """Makes engines; `adapters` are directories by name, those of the oracle where None is given.

    Pages of adapters are in pinned memory, as the store's are once they are registered.
    """

    def make(adapters: dict[str, Path] | None = None, **config: Any) -> Engine:
        settings = {
            "device": "cuda",
            "num_pool_tokens": 8192,
            "max_batched_tokens": 256,
            "max_running_requests": 16,
            **config,
        }
        engine = Engine.from_pretrained(model_dir, EngineConfig(**settings))
        for name, path in (oracle.adapters if adapters is None else adapters).items():
            packed = load_packed_adapter(path, engine.geometry)
            engine.add_adapter(replace(packed, adapter_id=name, pages=packed.pages.pin_memory()))
        return engine

    yield make
    torch.cuda.empty_cache()
