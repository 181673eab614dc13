"""One engine and its callers: sampling, bad requests, adapters that come and go, statistics."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slora_core.adapters.page_layout import PackedAdapter
from slora_core.adapters.peft_weights import load_packed_adapter
from slora_core.config import EngineConfig
from slora_core.engine.engine import Engine
from slora_core.errors import (
    AdapterNotFoundError,
    AdapterTooLargeError,
    InvalidRequestError,
    OverloadedError,
    SLoRAError,
    UnsupportedModelError,
)
from slora_core.execution.step_inputs import StepInputs
from slora_core.models.registry import load_model_config
from slora_core.models.weights import load_weights
from slora_core.requests import (
    Delta,
    FinishReason,
    Request,
    RequestState,
    SamplingParams,
    StepOutput,
)
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
    request_id: str,
    prompt: list[int] | None = None,
    adapter_id: str | None = None,
    output: Sequence[int] = (),
    **params,
) -> Request:
    settings = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True, **params}
    sampling = SamplingParams(**settings)
    return Request(prompt or [5, 6, 7], sampling, adapter_id, list(output), request_id=request_id)


def _run(engine: Engine) -> dict[str, FinishReason | SLoRAError | None]:
    """Step to the end; how each request ended."""
    endings = {}
    while engine.has_work:
        for delta in engine.step().deltas():
            endings[delta.request_id] = delta.error or delta.finish_reason
        engine.check_integrity()
    return endings


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
        Request(
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
    stoppable = [replace(e, sampling=replace(e.sampling, stop=("never",))) for e in entries]
    assert together == tight.generate(stoppable)
    assert tight.stats().num_preemptions > 0


def test_another_seed_gives_another_text(engine: Engine) -> None:
    entries = [
        Request([5, 6, 7], SamplingParams(max_tokens=20, seed=seed, ignore_eos=True))
        for seed in range(6)
    ]
    texts = engine.generate(entries)
    assert len({tuple(text) for text in texts}) == 6
    assert engine.generate(entries) == texts


@pytest.mark.parametrize("adapter_id", [None, "a"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_a_text_is_continued_elsewhere(
    make_engine, adapter_dir: Path, adapter_id: str | None, temperature: float, prefix_caching: bool
) -> None:
    """The first tokens of a text, given with its prompt, and sampled on from their number."""
    engine, elsewhere = (make_engine(prefix_caching=prefix_caching) for _ in range(2))
    for each in (engine, elsewhere):
        each.add_adapter(_pack(each, adapter_dir))
    settings = {"max_tokens": 40, "temperature": temperature, "seed": 9}
    whole = _request("whole", [5, 6, 7] * 2, adapter_id, **settings)
    (text,) = engine.generate([whole])
    assert len(text) == 40 and len(set(text)) > 5
    # With 9, 10 and 11 of them, prompt and answer end before, at and after the end of a page.
    for place in (elsewhere, engine):
        for count in (1, 9, 10, 11, 12, 26, 39):
            before = place.stats()
            request = replace(whole, output_ids=text[:count], request_id=f"moved-{count}")
            state = place.add_request(request)
            told = StepOutput()
            while place.has_work:
                told.extend(place.step())
                place.check_integrity()
            assert state.output_ids == text and request.output_ids == text[:count]
            # What came with the request is not given out again, and counts.
            assert told.deltas() == [Delta(request.request_id, text[count:], FinishReason.LENGTH)]
            after = place.stats()
            assert after.num_output_tokens - before.num_output_tokens == 40 - count
            # They are computed like a prompt, in one step, where they are not found.
            cached = after.num_cached_prompt_tokens - before.num_cached_prompt_tokens
            assert after.num_steps - before.num_steps <= 40 - count + 1
            if place is engine:
                # All that "whole" left, but for the last two tokens.
                assert cached == ((6 + count - 2) // 16 * 16 if prefix_caching else 0)


def test_continued_texts_in_one_batch(engine: Engine, make_engine, adapter_dir: Path) -> None:
    """In chunks, preempted, and beside requests that begin anew."""
    # One that a string may stop is admitted though its max_tokens might not fit.
    entries = [
        _request("", [9, 8, index + 3] * (1 + 6 * index), adapter_id, max_tokens=25, **sampling)
        for index, sampling in enumerate({"stop": ("never",), **each} for each in SAMPLING)
        for adapter_id in (None, "a")
    ]
    entries = [replace(entry, request_id=str(i)) for i, entry in enumerate(entries)]
    texts = engine.generate(entries)
    continued = [
        replace(entry, output_ids=text[: i % 7])
        for i, (entry, text) in enumerate(zip(entries, texts, strict=True))
    ]
    for config in ({"max_batched_tokens": 24}, {"num_pool_tokens": 16 * 14}):
        other = make_engine(admission_output_tokens=0, **config)
        other.add_adapter(_pack(other, adapter_dir))
        assert other.generate(continued) == texts
    assert other.stats().num_preemptions > 0


def test_a_continued_text_ends_as_the_whole_one_does(engine: Engine) -> None:
    (text,) = engine.generate([_request("whole", max_tokens=12)])
    assert text[7] not in text[:7]
    request = _request("r", output=text[:5], max_tokens=12, stop_token_ids=(text[7],))
    state = engine.add_request(request)
    assert _run(engine) == {"r": FinishReason.STOP}
    assert state.output_ids == text[:8]
    # It began elsewhere, where the token would have ended it.
    request = _request("r", output=text[:8], max_tokens=9, stop_token_ids=(text[7],))
    state = engine.add_request(request)
    assert _run(engine) == {"r": FinishReason.LENGTH}
    assert state.output_ids == text[:9]


def test_finish_reasons(engine: Engine) -> None:
    (text,) = engine.generate([Request([5, 6, 7], _request("x").sampling)])
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
    (text,) = engine.generate([Request([5, 6, 7], _request("x").sampling)])
    engine.add_request(_request("r", stop_token_ids=(text[2],)))
    new_tokens = [engine.step().token_ids for _ in range(6)]
    assert new_tokens == [[]] * (inflight - 1) + [[token] for token in text[:3]] + [[]] * (
        4 - inflight
    )
    assert not engine.has_work and engine.stats().num_steps == 8 + 3 + (inflight - 1)
    assert engine.stats().num_output_tokens == 8 + 3


BAD_REQUESTS = [
    (
        lambda: Request([], SamplingParams(), request_id="bad"),
        "the prompt is empty",
        "prompt",
    ),
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
    (
        lambda: _request("bad", output=[5] * 8),
        "the answer so far has 8 tokens and max_tokens is 8: nothing is left",
        "max_tokens",
    ),
    (
        lambda: _request("bad", output=[5] * 9),
        "the answer so far has 9 tokens and max_tokens is 8: nothing is left",
        "max_tokens",
    ),
    (
        lambda: _request("bad", output=[5, VOCAB]),
        "the answer so far has token id 256; ids are in .0, 256",
        "prompt",
    ),
    (
        lambda: _request("bad", output=[-1, 5]),
        "the answer so far has token id -1; ids are in .0, 256",
        "prompt",
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
        engine.generate([Request(r.prompt_ids, r.sampling, r.adapter_id)])[0] for r in others
    ]
    states = [engine.add_request(request) for request in others]
    engine.step()
    before = engine.stats()
    with pytest.raises(InvalidRequestError, match=message) as caught:
        engine.add_request(make())
    assert caught.value.param == param
    assert engine.stats() == before
    assert not engine.abort("bad")
    assert _run(engine) == {"base": FinishReason.LENGTH, "adapter": FinishReason.LENGTH}
    assert [state.output_ids for state in states] == expected


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


def test_a_request_refused_later_is_told_why_and_costs_others_nothing(
    engine: Engine, make_engine, inflight: int
) -> None:
    expected = engine.generate([_request("x", [4] * 20), _request("y", [4] * 20, "a")])
    engine.drop_adapter("a")
    free = engine.stats().num_free_pages + engine.stats().num_idle_prefix_pages
    others = [_request("base", [4] * 20), _request("adapter", [4] * 20, "a")]
    states = [engine.add_request(request) for request in others]
    engine.add_request(_request("refused", [7] * 20, max_tokens=50))
    for _ in range(3):
        engine.step()
    engine.add_request(_request("waiting", [8] * 20))
    error = OverloadedError("too late")
    for name in ("refused", "waiting"):
        assert engine.refuse(name, error)
        assert not engine.refuse(name, error) and not engine.abort(name)
        engine.check_integrity()
    assert not engine.refuse("unknown", error)
    output = engine.step()
    assert output.endings == {"refused": error, "waiting": error}
    assert {"refused", "waiting"}.isdisjoint(output.request_ids)
    assert _run(engine) == {"base": FinishReason.LENGTH, "adapter": FinishReason.LENGTH}
    assert [state.output_ids for state in states] == expected
    stats = engine.stats()
    assert stats.num_kv_pages == stats.num_running == stats.num_waiting == 0
    engine.drop_adapter("a")
    stats = engine.stats()
    assert stats.num_free_pages + stats.num_idle_prefix_pages == free
    assert stats.num_aborted == 0


def test_there_is_work_until_a_refusal_is_told(engine: Engine) -> None:
    error = OverloadedError("too late")
    engine.add_request(_request("r"))
    engine.refuse("r", error)
    assert engine.has_work
    assert engine.step() == StepOutput(endings={"r": error})
    assert not engine.has_work and engine.step() == StepOutput()
    # The last one, while its step may be in flight.
    engine.add_request(_request("r"))
    engine.step()
    engine.refuse("r", error)
    assert engine.has_work
    assert _run(engine) == {"r": error}
    assert engine.stats().num_kv_pages == 0


class LastComeFirst:
    """A waiting queue."""

    def __init__(self) -> None:
        self._requests: list[RequestState] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[RequestState]:
        return iter(self._requests)

    def add(self, request: RequestState) -> None:
        self._requests.append(request)

    put_back = add

    def head(self) -> RequestState | None:
        return self._requests[-1] if self._requests else None

    def remove(self, request: RequestState) -> None:
        self._requests.remove(request)


def test_requests_start_in_the_order_of_the_queue(model_dir: Path, inflight: int) -> None:
    model = load_model_config(model_dir)
    config = EngineConfig(num_pool_tokens=4096, max_running_requests=1, max_inflight_steps=inflight)
    weights = load_weights(model_dir, model, "cpu", torch.float32)
    endings = []
    for waiting in (None, LastComeFirst()):
        engine = Engine(model, config, weights, waiting=waiting)
        for name in "abc":
            engine.add_request(_request(name))
        endings.append(list(_run(engine)))
    assert endings == [list("abc"), list("cba")]


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
    run, waited_for = engine.runner.run, []

    class Handle:
        def __init__(self, inputs: StepInputs) -> None:
            self.inputs, self._handle = inputs, run(inputs)

        def token_ids(self) -> list[int]:
            waited_for.append(self.inputs)
            return self._handle.token_ids()

    monkeypatch.setattr(engine.runner, "run", Handle)
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
    entries = [Request([5, 6, 7], _request("x").sampling, name) for name in ("a", "newer")]
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
        Request([9, index + 3] * 9, SamplingParams(max_tokens=20, seed=index), adapter_id)
        for index in range(3)
        for adapter_id in (None, "a")
    ]
    expected = [engine.generate([entry])[0] for entry in good]
    bad = [
        Request([4] * 30, SamplingParams(max_tokens=9, temperature=t), "overflows")
        for t in (0.0, 1.0)
    ]
    for _ in range(3):
        texts = engine.generate([bad[0], *good[:3], bad[1], *good[3:]])
        assert texts[1:4] + texts[5:] == expected
        assert engine.generate(good) == expected
    engine.check_integrity()


def test_stats(engine: Engine, inflight: int) -> None:
    assert engine.step() == StepOutput() and engine.stats().num_steps == 0
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
    (text,) = engine.generate([Request([5, 6], SamplingParams(ignore_eos=True))])
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
    entries = [Request([5] * 40, _request("x").sampling, name) for name in (None, "a")]
    texts = engine.generate(entries)
    assert [len(text) for text in texts] == [8, 8] and texts[0] != texts[1]
