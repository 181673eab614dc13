"""Hundreds of adapters on a pool that holds a few: every request ends, none is another's."""

import functools
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from slora_core.adapters.page_layout import PackedAdapter
from slora_core.adapters.peft_weights import load_packed_adapter
from slora_core.config import EngineConfig
from slora_core.engine.engine import Engine
from slora_core.requests import Request, SamplingParams
from tests.factories import (
    ALL_MODULES,
    ATTENTION_MODULES,
    make_geometry,
    make_model,
    make_random_adapter,
)
from tests.oracle import GreedyOracle, assert_same_greedy
from tests.popularity import draw_adapters

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_ADAPTERS, NUM_REQUESTS = 300, 600
# Rank and targets, dealt out in turn: from one page to twelve.
SHAPES = [
    (4, ("q_proj", "v_proj")),
    (8, ("q_proj", "v_proj")),
    (8, ATTENTION_MODULES),
    (16, ("q_proj", "v_proj")),
    (4, ALL_MODULES),
    (32, ("v_proj",)),
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("many_adapters") / "model", "llama", seed=6)


@pytest.fixture(scope="module")
def adapters(model_dir: Path) -> dict[str, PackedAdapter]:
    """By directory name; packed once for all engines."""
    geometry = make_geometry(model_dir)
    found = {}
    for index in range(NUM_ADAPTERS):
        rank, targets = SHAPES[index % len(SHAPES)]
        path = make_random_adapter(
            model_dir.parent / f"adapter-{index}",
            model_dir,
            seed=index,
            rank=rank,
            target_modules=targets,
            use_rslora=index % 7 == 0,
        )
        packed = load_packed_adapter(path, geometry)
        found[path.name] = PackedAdapter(path.name, packed.layout, packed.pages)
    return found


def _engine(
    model_dir: Path, adapters: dict[str, PackedAdapter], num_pages: int, inflight: int = 1
) -> Engine:
    config = EngineConfig(
        num_pool_tokens=16 * num_pages,
        max_batched_tokens=64,
        max_running_requests=32,
        admission_output_tokens=0,
        max_inflight_steps=inflight,
    )
    engine = Engine.from_pretrained(model_dir, config)
    for packed in adapters.values():
        engine.add_adapter(packed)
    return engine


def _make_requests() -> list[Request]:
    """Every adapter once and as many skewed draws, shuffled; every 20th on the base model."""
    rng = random.Random(5)
    popularity = draw_adapters("distinct", NUM_REQUESTS // 2, NUM_ADAPTERS)
    popularity += draw_adapters("skewed", NUM_REQUESTS // 2, NUM_ADAPTERS, seed=2)
    rng.shuffle(popularity)
    requests = []
    for index, adapter in enumerate(popularity):
        requests.append(
            Request(
                rng.choices(range(3, 256), k=rng.randint(1, 40)),
                SamplingParams(max_tokens=rng.randint(2, 16), temperature=0.0),
                None if index % 20 == 0 else f"adapter-{adapter}",
                request_id=f"request-{index}",
            )
        )
    return requests


@pytest.fixture(scope="module")
def texts_alone(
    model_dir: Path, adapters: dict[str, PackedAdapter]
) -> Callable[[], list[list[int]]]:
    """Gives what each request gets with nothing beside it; made once, in a test's one thread."""

    @functools.cache
    def texts() -> list[list[int]]:
        engine = _engine(model_dir, adapters, 2000)
        return [engine.generate([request])[0] for request in _make_requests()]

    return texts


@pytest.fixture(scope="module")
def oracle(model_dir: Path, adapters: dict[str, PackedAdapter]) -> GreedyOracle:
    return GreedyOracle(model_dir, {name: model_dir.parent / name for name in adapters})


@pytest.mark.parametrize("inflight", [1, 2])
def test_six_hundred_requests_on_three_hundred_adapters(
    model_dir: Path,
    adapters: dict[str, PackedAdapter],
    texts_alone: Callable[[], list[list[int]]],
    oracle: GreedyOracle,
    inflight: int,
) -> None:
    sizes = [packed.layout.num_pages for packed in adapters.values()]
    num_pages = 20 * sum(sizes) // len(sizes)
    engine = _engine(model_dir, adapters, num_pages, inflight)
    requests = _make_requests()
    assert len({request.adapter_id for request in requests}) > 270
    states = []
    finished = {}
    most_resident = 0
    for index, request in enumerate(requests):
        states.append(engine.add_request(request))
        # Arrivals are faster than the engine, so that a queue builds up.
        if index % 3 == 0:
            finished |= {d.request_id: d.finish_reason for d in engine.step().deltas()}
            engine.check_integrity()
            most_resident = max(most_resident, len(engine.stats().resident_adapters))
    while engine.has_work:
        finished |= {d.request_id: d.finish_reason for d in engine.step().deltas()}
        engine.check_integrity()

    assert len(finished) == NUM_REQUESTS and None not in finished.values()
    stats = engine.stats()
    assert stats.num_finished == NUM_REQUESTS
    assert (stats.num_kv_pages, stats.num_running, stats.num_waiting) == (0, 0, 0)
    kept = stats.num_idle_prefix_pages + stats.num_adapter_pages
    assert stats.num_free_pages + kept == num_pages, "a page is lost"
    assert 10 <= most_resident <= 40
    assert stats.num_adapter_evictions > 50

    for state, expected in zip(states, texts_alone(), strict=True):
        assert_same_greedy(oracle, state.prompt_ids, state.output_ids, expected, state.adapter_id)
    # The two engines could be wrong together: some against transformers.
    for state in states[::40]:
        expected = oracle.generate(state.prompt_ids, state.sampling.max_tokens, state.adapter_id)
        assert_same_greedy(oracle, state.prompt_ids, state.output_ids, expected, state.adapter_id)
