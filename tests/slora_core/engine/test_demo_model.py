"""The demo model and its shipped adapters through the engine, against transformers + PEFT."""

from pathlib import Path

import pytest

from app.models.demo import ensure_demo_model
from benchmarks.demo.demo_tasks import TASKS, held_out_examples, messages
from slora_core.adapters.page_layout import PackedAdapter
from slora_core.adapters.peft_weights import load_packed_adapter
from slora_core.config import EngineConfig
from slora_core.engine.engine import Engine
from slora_core.requests import Request, SamplingParams
from slora_core.text.tokenizer import Tokenizer
from tests.oracle import GreedyOracle, assert_same_greedy

ADAPTERS_DIR = Path(__file__).parents[3] / "serve_configs" / "adapters"
# A user may have put others beside them.
ADAPTERS = sorted(TASKS)
# A page and one more.
MAX_TOKENS = 17


@pytest.fixture(scope="module")
def prompts() -> dict[str | None, list[int]]:
    """A held-out example of each adapter's task; the base model gets the first one's, too."""
    tokenizer = Tokenizer(ensure_demo_model())

    def prompt(task: str) -> list[int]:
        text = tokenizer.chat_template.render(messages(held_out_examples(task, 1)[0]))
        return tokenizer.encode(text, add_special_tokens=False)

    return {None: prompt(min(TASKS)), **{name: prompt(name) for name in ADAPTERS}}


@pytest.fixture(scope="module")
def oracle() -> GreedyOracle:
    return GreedyOracle(ensure_demo_model(), {name: ADAPTERS_DIR / name for name in ADAPTERS})


@pytest.fixture(scope="module")
def engine() -> Engine:
    # The prompt takes two chunks.
    config = EngineConfig(num_pool_tokens=4096, max_batched_tokens=48)
    engine = Engine.from_pretrained(ensure_demo_model(), config)
    for name in ADAPTERS:
        packed = load_packed_adapter(ADAPTERS_DIR / name, engine.geometry)
        engine.add_adapter(PackedAdapter(name, packed.layout, packed.pages))
    return engine


def _generate(engine: Engine, prompts: dict[str | None, list[int]], *names: str | None):
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
    return engine.generate([Request(prompts[name], params, name) for name in names])


def _check(
    oracle: GreedyOracle, prompts: dict[str | None, list[int]], actual: list[int], name: str | None
) -> None:
    expected = oracle.generate(prompts[name], MAX_TOKENS, name)
    assert_same_greedy(oracle, prompts[name], actual, expected, name)


def test_base(engine: Engine, oracle: GreedyOracle, prompts) -> None:
    (actual,) = _generate(engine, prompts, None)
    _check(oracle, prompts, actual, None)


def test_adapters_are_shipped() -> None:
    assert len(ADAPTERS) >= 4
    shipped = {path.parent.name for path in ADAPTERS_DIR.glob("*/adapter_config.json")}
    assert shipped >= set(ADAPTERS)


@pytest.mark.parametrize("name", ADAPTERS)
def test_each_adapter(engine: Engine, oracle: GreedyOracle, prompts, name: str) -> None:
    (actual,) = _generate(engine, prompts, name)
    _check(oracle, prompts, actual, name)
    assert actual != oracle.generate(prompts[name], MAX_TOKENS), "the adapter changes nothing"


def test_one_batch_of_them_all(engine: Engine, oracle: GreedyOracle, prompts) -> None:
    names = [None, *ADAPTERS]
    for actual, name in zip(_generate(engine, prompts, *names), names, strict=True):
        _check(oracle, prompts, actual, name)
    assert set(engine.stats().resident_adapters) == set(ADAPTERS)
    engine.check_integrity()
