"""The stubbed engine gives tokens that are known before, at its own pace, by the real protocol."""

import asyncio
import signal
from dataclasses import replace

import pytest

from benchmarks.serving import stub_engine
from benchmarks.serving.stub_engine import StubEngine, StubSpec
from benchmarks.serving.stub_tokens import StubVocabulary, answer_key
from slora_core.adapters.page_layout import PackedAdapter, plan_layout
from slora_core.config import EngineConfig
from slora_core.engine.process import AsyncEngine
from slora_core.errors import EngineDeadError
from slora_core.models.registry import load_model_config
from slora_core.requests import FinishReason, Request, SamplingParams
from tests.factories import make_model

CONFIG = EngineConfig(num_pool_tokens=1024, page_tokens=8, max_running_requests=3)
GREEDY = SamplingParams(max_tokens=12, temperature=0)
CRASH = 77


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def spec(model_dir):
    return StubSpec(str(model_dir), engine=CONFIG, num_threads=1, step_s=0.0)


@pytest.fixture(scope="module")
def vocabulary(model_dir):
    model = load_model_config(model_dir)
    return StubVocabulary(model.vocab_size, model.eos_token_ids)


class Clock:
    """In place of the module `time`."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_every_token_but_the_ends_is_given():
    vocabulary = StubVocabulary(10, {0, 4, 5, 9})
    key = answer_key([1], None, GREEDY)
    assert {vocabulary.token(key, index) for index in range(200)} == {1, 2, 3, 6, 7, 8}


def test_what_an_answer_depends_on(vocabulary):
    sampled = replace(GREEDY, temperature=1.0, seed=5)
    requests = [
        Request([1, 2], GREEDY),
        Request([2, 1], GREEDY),
        Request([1, 2], GREEDY, "adapter"),
        Request([1, 2], GREEDY, "another"),
        Request([1, 2], sampled),
        Request([1, 2], replace(sampled, seed=6)),
    ]
    answers = {tuple(vocabulary.answer(request)) for request in requests}
    assert len(answers) == len(requests)
    # The random numbers of a greedy answer are not used.
    same = Request([1, 2], replace(GREEDY, seed=6))
    assert vocabulary.answer(same) == vocabulary.answer(requests[0])


def test_answers_of_a_batch_with_an_adapter(spec, vocabulary):
    engine = StubEngine(spec)
    layout = plan_layout(engine.geometry, {(0, 0): 4}, {(0, 0): 1.0})
    engine.add_adapter(PackedAdapter("adapter", layout, None))
    requests = [
        Request([token, 8, 9], GREEDY, adapter_id)
        for token in range(5)
        for adapter_id in (None, "adapter")
    ]
    assert engine.generate(requests) == [vocabulary.answer(request) for request in requests]
    stats = engine.stats()
    assert (stats.num_finished, stats.num_output_tokens) == (10, 120)
    assert stats.num_adapter_loads == 1 and stats.resident_adapters == ("adapter",)
    # Ten requests, three at a time.
    assert stats.num_steps >= 4 * 12
    engine.check_integrity()


def test_a_continued_answer_goes_on_where_it_was(spec, vocabulary):
    engine = StubEngine(spec)
    whole = vocabulary.answer(Request([7, 8, 9], GREEDY))
    for num_sent in (1, 5, 11):
        request = Request([7, 8, 9], GREEDY, output_ids=whole[:num_sent])
        assert engine.generate([request]) == [whole]


def test_a_step_takes_its_time(spec, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(stub_engine, "time", clock)
    engine = StubEngine(replace(spec, step_s=0.25))
    engine.generate([Request([1, 2, 3], GREEDY) for _ in range(3)])
    assert clock.now == pytest.approx(100.0 + 12 * 0.25)


def test_two_steps_in_flight_run_one_after_the_other(spec, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(stub_engine, "time", clock)
    config = replace(CONFIG, max_inflight_steps=2)
    engine = StubEngine(replace(spec, engine=config, step_s=0.25))
    engine.generate([Request([1, 2, 3], GREEDY)])
    assert clock.now == pytest.approx(100.0 + 12 * 0.25)


def run(spec, use):
    """What `use` makes of a stubbed engine in a process of its own."""

    async def main():
        engine = AsyncEngine(spec, program="benchmarks.serving.stub_engine")
        info = await engine.start()
        assert info.num_pages == CONFIG.num_pages and info.page_tokens == CONFIG.page_tokens
        try:
            return await use(engine)
        finally:
            engine.close()

    return asyncio.run(main())


async def collect(engine, request):
    token_ids, ending = [], None
    with engine.generate(request) as stream:
        async for delta in stream:
            token_ids += delta.token_ids
            ending = delta.error or delta.finish_reason
    return token_ids, ending


def test_a_process_of_its_own(spec, vocabulary):
    requests = [Request([token, 8, 9], GREEDY) for token in range(5)]

    async def use(engine):
        answers = await asyncio.gather(*(collect(engine, request) for request in requests))
        endless = Request([1], replace(GREEDY, max_tokens=500))
        with engine.generate(endless) as stream:
            await anext(stream)
        while (stats := await engine.stats()).num_running:
            await asyncio.sleep(0.01)
        await engine.check_integrity()
        return answers, stats

    answers, stats = run(replace(spec, step_s=0.001), use)
    assert answers == [(vocabulary.answer(r), FinishReason.LENGTH) for r in requests]
    assert (stats.num_finished, stats.num_aborted) == (5, 1)


@pytest.mark.parametrize("num_sent", [0, 2])
def test_a_request_that_kills_its_engine(spec, vocabulary, num_sent):
    """In the step that would give the token `crash_at`, be the answer begun elsewhere or here."""
    deadly = Request([CRASH, 1], GREEDY)
    begun = replace(deadly, output_ids=vocabulary.answer(deadly)[:num_sent])

    async def use(engine):
        answer = await collect(engine, begun)
        return answer, engine._process.wait(10)

    (token_ids, ending), status = run(replace(spec, crash_token_id=CRASH, crash_at=4), use)
    assert token_ids == vocabulary.answer(deadly)[num_sent:4]
    assert isinstance(ending, EngineDeadError)
    assert status == -signal.SIGSEGV


def test_other_requests_do_not_kill_it(spec, vocabulary):
    request = Request([CRASH + 1], GREEDY)
    short = Request([CRASH], replace(GREEDY, max_tokens=4))

    async def use(engine):
        return [await collect(engine, request), await collect(engine, short)]

    answers = run(replace(spec, crash_token_id=CRASH, crash_at=4), use)
    assert answers == [(vocabulary.answer(r), FinishReason.LENGTH) for r in (request, short)]
