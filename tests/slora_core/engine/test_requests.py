"""One engine and its callers: sampling, bad requests, adapters that come and go, statistics."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from slora_core.adapters.page_layout import PackedAdapter
from slora_core.adapters.peft_weights import load_packed_adapter
from slora_core.config import EngineConfig
from slora_core.engine.engine import Engine, GenerationRequest
from slora_core.errors import (
    AdapterNotFoundError,
    AdapterTooLargeError,
    InvalidRequestError,
    UnsupportedModelError,
)
from slora_core.requests import FinishReason, Request, SamplingParams, StepPlan
from tests.factories import ALL_MODULES, make_model, make_random_adapter

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB, CONTEXT = 256, 512


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("engine_requests") / "model", "llama", seed=4)


@pytest.fixture(scope="module")
def adapter_dir(model_dir: Path) -> Path:
    return make_random_adapter(model_dir.parent / "adapter", model_dir, seed=1, rank=8)


@pytest.fixture(params=[1, 2])
def inflight(request) -> int:
    """Steps in flight."""
    return request.param


@pytest.fixture
def make_engine(model_dir: Path, inflight: int) -> Callable[..., Engine]:
    defaults = {
        "num_pool_tokens": 4096,
        "max_batched_tokens": 64,
        "max_inflight_steps": inflight,
    }

    def make(**config) -> Engine:
        return Engine.from_pretrained(model_dir, EngineConfig(**defaults | config))

    return make


@pytest.fixture
def engine(make_engine: Callable[..., Engine], adapter_dir: Path) -> Engine:
    engine = make_engine()
    engine.add_adapter(_pack(engine, adapter_dir))
    return engine


def _pack(engine: Engine, directory: Path, adapter_id: str = "a") -> PackedAdapter:
    packed = load_packed_adapter(directory, engine.geometry)
    return PackedAdapter(adapter_id, packed.layout, packed.pages)


def _request(
    request_id: str, prompt: list[int] | None = None, adapter_id: str | None = None, **params
) -> Request:
    settings = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True, **params}
    return Request(request_id, prompt or [5, 6, 7], SamplingParams(**settings), adapter_id)


def _run(engine: Engine) -> dict[str, FinishReason | None]:
    """Step to the end; how each request finished."""
    reasons = {}
    while engine.has_work:
        for output in engine.step():
            reasons[output.request_id] = output.finish_reason
        engine.check_integrity()
    return reasons


SAMPLING = [
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.7, "seed": 2, "top_p": 0.9},
    {"temperature": 1.3, "seed": 3, "top_k": 20},
    {"temperature": 1.0, "seed": 4, "min_p": 0.05},
    {"temperature": 0.9, "seed": -5, "top_k": 50, "top_p": 0.8, "min_p": 0.01},
]


def test_a_sampled_text_is_the_same_in_a_batch_and_alone(
    engine: Engine, make_engine, adapter_dir: Path
) -> None:
    entries = [
        GenerationRequest(
            [9, 8, index + 3] * (1 + 6 * index),
            SamplingParams(max_tokens=25, ignore_eos=True, **sampling),
            adapter_id,
        )
        for index, sampling in enumerate(SAMPLING)
        for adapter_id in (None, "a")
    ]
    together = engine.generate(entries)
    alone = make_engine()
    alone.add_adapter(_pack(alone, adapter_dir))
    assert together == [alone.generate([entry])[0] for entry in entries]
    # Preempted ones too, in a pool that holds a few of them.
    tight = make_engine(num_pool_tokens=16 * 18, admission_output_tokens=0)
    tight.add_adapter(_pack(tight, adapter_dir))
    # One that a string may stop is admitted though its max_tokens might not fit.
    stoppable = [replace(e, params=replace(e.params, stop=("never",))) for e in entries]
    assert together == tight.generate(stoppable)
    assert tight.stats().num_preemptions > 0


def test_another_seed_gives_another_text(engine: Engine) -> None:
    entries = [
        GenerationRequest([5, 6, 7], SamplingParams(max_tokens=20, seed=seed, ignore_eos=True))
        for seed in range(6)
    ]
    texts = engine.generate(entries)
    assert len({tuple(text) for text in texts}) == 6
    assert engine.generate(entries) == texts


def test_a_text_is_continued_elsewhere(engine: Engine) -> None:
    """The first tokens of a text moved to the prompt, and sampled on from their number."""
    params = SamplingParams(max_tokens=20, seed=9, ignore_eos=True)
    (text,) = engine.generate([GenerationRequest([5, 6, 7], params)])
    moved = Request("moved", [5, 6, 7], params, output_ids=text[:8])
    engine.add_request(moved)
    _run(engine)
    assert moved.output_ids == text


def test_finish_reasons(engine: Engine) -> None:
    (text,) = engine.generate([GenerationRequest([5, 6, 7], _request("x").params)])
    eos = engine.model.eos_token_ids[0]
    assert eos not in text
    engine.add_request(_request("length"))
    engine.add_request(_request("stop id", stop_token_ids=(text[3],)))
    engine.add_request(_request("first token", stop_token_ids=(text[0],)))
    engine.add_request(_request("one token", max_tokens=1))
    assert _run(engine) == {
        "length": FinishReason.LENGTH,
        "stop id": FinishReason.STOP,
        "first token": FinishReason.STOP,
        "one token": FinishReason.LENGTH,
    }


def test_outputs_come_a_step_later_with_two_in_flight(engine: Engine, inflight: int) -> None:
    (text,) = engine.generate([GenerationRequest([5, 6, 7], _request("x").params)])
    engine.add_request(_request("r", stop_token_ids=(text[2],)))
    outputs = [engine.step() for _ in range(6)]
    new_tokens = [[token for o in step for token in o.new_token_ids] for step in outputs]
    assert new_tokens == [[]] * (inflight - 1) + [[token] for token in text[:3]] + [[]] * (
        4 - inflight
    )
    assert not engine.has_work and engine.stats().num_steps == 8 + 3 + (inflight - 1)
    assert engine.stats().num_output_tokens == 8 + 3


BAD_REQUESTS = [
    (lambda: Request("bad", [], SamplingParams()), "the prompt is empty", "prompt"),
    (lambda: _request("bad", [5, VOCAB, 6]), "token id 256; ids are in .0, 256", "prompt"),
    (lambda: _request("bad", [5, -1, 6]), "token id -1; ids are in .0, 256", "prompt"),
    (
        lambda: _request("bad", [5] * 500, max_tokens=13),
        "500 tokens and max_tokens 13 exceed the context of 512",
        "max_tokens",
    ),
    (
        lambda: _request("bad", [5] * 200, max_tokens=100),
        "300 tokens need 19 pages and the adapter 0; the pool has 16 pages",
        "max_tokens",
    ),
    (
        lambda: _request("bad", [5] * 200, "a", max_tokens=50),
        "250 tokens need 16 pages and the adapter 2; the pool has 16 pages",
        "max_tokens",
    ),
]


@pytest.mark.parametrize(
    "make,message,param", BAD_REQUESTS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_a_bad_request_is_refused_and_costs_others_nothing(
    make_engine, adapter_dir: Path, make, message: str, param: str
) -> None:
    engine = make_engine(num_pool_tokens=256)
    engine.add_adapter(_pack(engine, adapter_dir))
    others = [_request("base", [4] * 20), _request("adapter", [4] * 20, "a")]
    expected = [
        engine.generate([GenerationRequest(r.prompt_ids, r.params, r.adapter_id)])[0]
        for r in others
    ]
    for request in others:
        engine.add_request(request)
    engine.step()
    before = engine.stats()
    with pytest.raises(InvalidRequestError, match=message) as caught:
        engine.add_request(make())
    assert caught.value.param == param
    assert engine.stats() == before
    assert not engine.abort("bad")
    assert _run(engine) == {"base": FinishReason.LENGTH, "adapter": FinishReason.LENGTH}
    assert [request.output_ids for request in others] == expected


def test_the_longest_request_that_fits(make_engine) -> None:
    engine = make_engine(num_pool_tokens=256)
    engine.add_request(_request("whole pool", [5] * 200, max_tokens=56))
    assert _run(engine) == {"whole pool": FinishReason.LENGTH}
    engine = make_engine(max_model_len=40)
    engine.add_request(_request("whole context", [5] * 30, max_tokens=10))
    with pytest.raises(InvalidRequestError, match="exceed the context of 40"):
        engine.add_request(_request("more", [5] * 31, max_tokens=10))
    assert _run(engine) == {"whole context": FinishReason.LENGTH}


def test_unknown_adapter(engine: Engine) -> None:
    with pytest.raises(AdapterNotFoundError, match="'b'"):
        engine.add_request(_request("r", adapter_id="b"))
    assert not engine.has_work


def test_adapter_larger_than_the_pool(make_engine, model_dir: Path, tmp_path: Path) -> None:
    engine = make_engine(num_pool_tokens=16 * 10)
    path = make_random_adapter(tmp_path, model_dir, rank=64, target_modules=ALL_MODULES)
    packed = _pack(engine, path)
    expected = f"needs {packed.layout.num_pages} pages; the pool has 10"
    with pytest.raises(AdapterTooLargeError, match=expected):
        engine.add_adapter(packed)
    with pytest.raises(AdapterNotFoundError):
        engine.add_request(_request("r", adapter_id="a"))


def test_a_dropped_adapter_ends_its_requests_and_gives_its_pages_back(engine: Engine) -> None:
    engine.add_request(_request("r", adapter_id="a"))
    engine.step()
    engine.drop_adapter("a")
    assert engine.stats().resident_adapters == ("a",)
    assert _run(engine) == {"r": FinishReason.LENGTH}
    assert engine.stats().num_adapter_pages == 0
    engine.release_adapter("a")
    with pytest.raises(AdapterNotFoundError):
        engine.add_request(_request("again", adapter_id="a"))


def test_release_of_an_adapter_waits_for_a_step_that_copies_it(
    engine: Engine, inflight: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its host pages may go as soon as the call returns, even where its request was aborted."""
    launch, waited_for = engine.runner.launch, []

    class Handle:
        def __init__(self, plan: StepPlan) -> None:
            self.plan, self._handle = plan, launch(plan)

        def token_ids(self) -> list[int]:
            waited_for.append(self.plan)
            return self._handle.token_ids()

    monkeypatch.setattr(engine.runner, "launch", Handle)
    engine.add_request(_request("r", adapter_id="a"))
    engine.step()
    assert len(waited_for) == (1 if inflight == 1 else 0)
    engine.abort("r")
    engine.release_adapter("a")
    assert len(waited_for) == 1
    assert _run(engine) == {}


def test_a_new_version_of_an_adapter_serves_beside_the_old(
    engine: Engine, model_dir: Path, tmp_path: Path
) -> None:
    newer = make_random_adapter(tmp_path, model_dir, seed=2, rank=16)
    engine.add_adapter(_pack(engine, newer, "newer"))
    entries = [GenerationRequest([5, 6, 7], _request("x").params, name) for name in ("a", "newer")]
    alone = [engine.generate([entry])[0] for entry in entries]
    assert alone[0] != alone[1]
    assert engine.generate(entries) == alone


def test_an_adapter_that_overflows_hurts_only_its_own_requests(
    make_engine, model_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    """Finite weights so large that its rows become NaN, in the pages it leaves as in its logits."""
    path = make_random_adapter(tmp_path, model_dir, rank=4, target_modules=ALL_MODULES, scale=1e30)
    # Every page is used again soon.
    engine = make_engine(num_pool_tokens=16 * 20)
    engine.add_adapter(_pack(engine, adapter_dir))
    engine.add_adapter(_pack(engine, path, "overflows"))
    good = [
        GenerationRequest([9, index + 3] * 9, SamplingParams(max_tokens=20, seed=index), adapter_id)
        for index in range(3)
        for adapter_id in (None, "a")
    ]
    expected = [engine.generate([entry])[0] for entry in good]
    bad = [
        GenerationRequest([4] * 30, SamplingParams(max_tokens=9, temperature=t), "overflows")
        for t in (0.0, 1.0)
    ]
    for _ in range(3):
        texts = engine.generate([bad[0], *good[:3], bad[1], *good[3:]])
        assert texts[1:4] + texts[5:] == expected
        assert engine.generate(good) == expected
    engine.check_integrity()


def test_stats(engine: Engine, inflight: int) -> None:
    assert engine.step() == [] and engine.stats().num_steps == 0
    for name in ("a", "b", "c"):
        engine.add_request(_request(name, adapter_id="a" if name == "a" else None))
    stats = engine.stats()
    assert (stats.num_waiting, stats.num_running, stats.num_prompt_tokens) == (3, 0, 9)
    engine.step()
    assert engine.abort("b") and not engine.abort("b")
    stats = engine.stats()
    assert (stats.num_waiting, stats.num_running) == (0, 2)
    # The page of what was aborted goes with the step that is in flight.
    num_kv_pages = 2 if inflight == 1 else 3
    assert (stats.num_kv_pages, stats.num_adapter_pages, stats.num_pages) == (num_kv_pages, 2, 256)
    _run(engine)
    stats = engine.stats()
    assert stats.num_free_pages + stats.num_adapter_pages == stats.num_pages
    assert (stats.num_finished, stats.num_aborted, stats.num_steps) == (2, 1, 8)
    # So goes its token.
    assert stats.num_output_tokens == 2 * 8 + (1 if inflight == 1 else 0)
    assert (stats.num_adapter_loads, stats.num_adapter_hits) == (1, 0)
    assert not engine.has_work


def test_load_formats(model_dir: Path, tmp_path: Path) -> None:
    config = EngineConfig(num_pool_tokens=256)
    (tmp_path / "config.json").write_text((model_dir / "config.json").read_text())
    engine = Engine.from_pretrained(tmp_path, config, load_format="dummy")
    (text,) = engine.generate([GenerationRequest([5, 6], SamplingParams(ignore_eos=True))])
    assert len(text) == 16
    assert list(engine.startup_s) == ["weights", "pool"]
    with pytest.raises(UnsupportedModelError, match="does not exist"):
        Engine.from_pretrained(tmp_path, config)
    with pytest.raises(ValueError, match="load_format is 'pickle'"):
        Engine.from_pretrained(model_dir, config, load_format="pickle")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_runs(make_engine, adapter_dir: Path, dtype: str) -> None:
    engine = make_engine(dtype=dtype)
    engine.add_adapter(_pack(engine, adapter_dir))
    entries = [GenerationRequest([5] * 40, _request("x").params, name) for name in (None, "a")]
    texts = engine.generate(entries)
    assert [len(text) for text in texts] == [8, 8] and texts[0] != texts[1]
