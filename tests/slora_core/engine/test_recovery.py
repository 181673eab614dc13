"""A step that fails costs the request that it is to be blamed on its answer, and nobody else's."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slora_core.config import EngineConfig
from slora_core.engine.engine import Engine
from slora_core.engine.recovery import MAX_FAILURES_IN_A_ROW
from slora_core.errors import EngineFaultError
from slora_core.execution.step_handle import StepHandle
from slora_core.models.registry import load_model_config
from slora_core.models.weights import load_weights
from slora_core.requests import TRIAL_TOKENS, Request, RequestState, SamplingParams, StepPlan
from tests.slora_core.engine.failing_steps import (
    PAGE_TOKENS,
    FailingOps,
    count_failures,
    fail_where,
    finish,
    is_poisoned,
    make_paths,
    pack,
    requests,
    run,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_paths(tmp_path_factory.mktemp("recovery"))


@pytest.fixture
def ops() -> FailingOps:
    return FailingOps()


@pytest.fixture(params=[1, 2], ids=["one step", "two steps"])
def engine(request, paths: dict[str, Path], ops: FailingOps) -> Engine:
    config = EngineConfig(
        num_pool_tokens=1024,
        page_tokens=PAGE_TOKENS,
        max_batched_tokens=48,
        max_inflight_steps=request.param,
    )
    model = load_model_config(paths["model"])
    weights = load_weights(paths["model"], model, "cpu", torch.float32)
    engine = Engine(model, config, weights, ops.module())
    for name in "ab":
        engine.add_adapter(pack(engine, paths, name))
    return engine


@pytest.mark.parametrize("poison_at", range(9))
def test_a_request_that_no_step_survives_is_refused_alone(engine: Engine, poison_at: int) -> None:
    expected = run(engine, requests())
    failed = fail_where(engine, is_poisoned)
    results = run(engine, requests(poison_at))
    error = results.pop(f"r{poison_at}")
    assert isinstance(error, EngineFaultError) and "no memory for this step" in str(error)
    del expected[f"r{poison_at}"]
    assert results == expected
    # Once among others, and once as the newcomer among those that had passed.
    assert len(failed) == 2
    stats = engine.stats()
    assert (stats.num_refused, stats.num_running, stats.num_waiting) == (1, 0, 0)


def test_two_of_them_are_both_found(engine: Engine) -> None:
    expected = run(engine, requests())
    fail_where(engine, is_poisoned)
    given = requests(2)
    given[6] = requests(6)[6]
    results = run(engine, given)
    for name in ("r2", "r6"):
        assert isinstance(results.pop(name), EngineFaultError)
        del expected[name]
    assert results == expected


def test_one_that_fails_in_the_middle_of_its_answer(engine: Engine) -> None:
    def fails(plan: StepPlan) -> bool:
        return any(
            chunk.request.request_id == "r4" and chunk.end > len(chunk.request.prompt_ids) + 3
            for chunk in plan.chunks
        )

    expected = run(engine, requests())
    fail_where(engine, fails)
    results = run(engine, requests())
    assert isinstance(results.pop("r4"), EngineFaultError)
    del expected["r4"]
    assert results == expected


@pytest.mark.parametrize("is_trial_going", [False, True])
def test_an_adapter_that_cannot_be_copied_costs_its_own_requests(
    engine: Engine, paths: dict[str, Path], is_trial_going: bool
) -> None:
    """All of them at once, and none of the others has to be tried for it."""
    expected = run(engine, requests())
    engine.drop_adapter("b")
    packed = pack(engine, paths, "b")
    engine.add_adapter(replace(packed, pages=packed.pages[..., :7]))
    if is_trial_going:
        fail_where(engine, is_poisoned)
    num_failed = count_failures(engine)
    results = run(engine, requests(0 if is_trial_going else None))
    for index in range(9):
        result = results[f"r{index}"]
        if index % 3 == 2:
            assert isinstance(result, EngineFaultError) and "adapter" in str(result)
        elif index == 0 and is_trial_going:
            assert isinstance(result, EngineFaultError)
        else:
            assert result == expected[f"r{index}"]
    assert "b" not in engine.stats().resident_adapters
    assert num_failed() == (3 if is_trial_going else 1)
    # With pages that can be copied it is served.
    engine.add_adapter(packed)
    assert run(engine, requests()) == expected


@pytest.mark.parametrize("is_broken", [False, True])
def test_an_adapter_of_a_request_that_waits_for_its_first_chunk(
    engine: Engine, paths: dict[str, Path], is_broken: bool
) -> None:
    """It is to be copied in the step that fails, in which nothing of its request is computed."""
    sampling = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    given = [
        Request([5] * 200, sampling, "a", request_id="long"),
        Request([6] * 240, sampling, "b", request_id="longer"),
    ]
    expected = run(engine, given)
    for name in "ab":
        engine.drop_adapter(name)
    packed = pack(engine, paths, "b")
    if is_broken:
        engine.add_adapter(replace(packed, pages=packed.pages[..., :7]))
    else:
        failed = fail_where(engine, lambda plan: not failed and bool(plan.adapter_loads))
    num_failed = count_failures(engine)
    results = run(engine, given)
    assert num_failed() == 1
    assert results["long"] == expected["long"]
    if is_broken:
        assert isinstance(results["longer"], EngineFaultError)
        assert "b" not in engine.stats().resident_adapters
        engine.add_adapter(packed)
        assert run(engine, given) == expected
    else:
        assert failed == [["long"]]
        assert results == expected


def test_out_of_memory_in_the_middle_of_a_step_is_tried_again(
    engine: Engine, ops: FailingOps
) -> None:
    """Some layers of it have written KV by then; at any step, of prompts or of decodes."""
    expected = run(engine, requests())
    for at_call in (2, 5, 8, 12, 16):
        num_calls = 0

        def fails(at_call: int = at_call) -> bool:
            nonlocal num_calls
            num_calls += 1
            return num_calls == at_call

        ops.fails = fails
        assert run(engine, requests()) == expected
        assert num_calls > at_call
        # Of the next one nobody knows whether it has to do with this one.
        engine._recovery._num_steps_left = 0


def test_an_engine_that_fails_at_everything_ends(engine: Engine, ops: FailingOps) -> None:
    """Instead of refusing all that ever comes; a few bad requests at once do not end it."""
    expected = run(engine, requests())
    ops.fails = lambda: True
    with pytest.raises(torch.OutOfMemoryError):
        run(engine, requests())
    assert len(expected) > MAX_FAILURES_IN_A_ROW > engine.stats().num_refused > 1


@pytest.mark.parametrize("at_step", [1, 3, 6])
def test_a_failure_that_does_not_come_again_costs_nobody_an_answer(
    engine: Engine, at_step: int
) -> None:
    num_steps = 0

    def fails(plan: StepPlan) -> bool:
        nonlocal num_steps
        num_steps += 1
        return num_steps == at_step

    expected = run(engine, requests())
    failed = fail_where(engine, fails)
    assert run(engine, requests()) == expected
    assert len(failed) == 1


def test_where_nobody_can_be_blamed_the_engine_ends_and_names_the_step(engine: Engine) -> None:
    """A second time, after each request has passed its trial."""

    def fails(plan: StepPlan) -> bool:
        all_passed = bool(failed) and not engine._recovery.is_going
        return all_passed or all(chunk.is_decode for chunk in plan.chunks) and not failed

    failed = fail_where(engine, fails)
    with pytest.raises(MemoryError):
        run(engine, requests()[:3])
    assert engine.step_request_ids() == failed[-1]


def test_a_step_that_fails_on_the_device_is_named(engine: Engine) -> None:
    """Also where another was launched after it, which has none of its requests."""
    first, second = (
        Request([5, 6, 7], SamplingParams(max_tokens=1), request_id=name)
        for name in ("first", "second")
    )

    class FailingHandle(StepHandle):
        def token_ids(self) -> list[int]:
            raise torch.AcceleratorError("an illegal memory access was encountered")

    engine._run = lambda plan: FailingHandle(torch.empty(0))  # type: ignore[method-assign]
    engine.add_request(first)
    with pytest.raises(torch.AcceleratorError):
        engine.step()
        engine.add_request(second)
        engine.step()
    in_flight = ["first", "second"][: engine.config.max_inflight_steps]
    assert engine.step_request_ids() == in_flight


def test_a_plan_that_fails_names_whom_it_was_about_to_start(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not the requests of the plan before."""
    engine.generate(requests()[:1])
    running = engine.scheduler._running
    compute = running.compute

    def fail(plan: StepPlan, request: RequestState, end: int) -> None:
        compute(plan, request, end)
        assert request.request_id != "r2", "a defect of the scheduler"

    monkeypatch.setattr(running, "compute", fail)
    for request in requests()[1:4]:
        engine.add_request(request)
    with pytest.raises(AssertionError, match="a defect"):
        engine.step()
    named = engine.step_request_ids()
    assert {"r1", "r2"} <= set(named) <= {"r1", "r2", "r3"}


def test_who_comes_and_who_leaves_while_others_are_tried(engine: Engine) -> None:
    expected = run(engine, requests())
    fail_where(engine, is_poisoned)
    first, later = requests(1)[:6], requests()[6:]
    for request in first:
        engine.add_request(request)
    while not engine._recovery.is_going:
        engine.step()
    for request in later:
        engine.add_request(request)
    assert engine.stats().num_waiting + engine.stats().num_running == 9
    # One that is not tried yet, and has to be nobody's.
    assert engine.abort("r5") and not engine.abort("r5")
    assert engine.refuse("r7", EngineFaultError("by hand"))
    results = finish(engine, [r for r in (*first, *later) if r.request_id != "r5"])
    assert isinstance(results.pop("r1"), EngineFaultError)
    assert str(results.pop("r7")) == "by hand"
    assert results == {name: expected[name] for name in ("r0", "r2", "r3", "r4", "r6", "r8")}


def as_suspects(given: list[Request], *indices: int) -> list[Request]:
    return [
        replace(request, num_moves=1, is_suspect=True) if index in indices else request
        for index, request in enumerate(given)
    ]


def test_suspects_of_a_death_elsewhere_run_apart_until_they_are_cleared(engine: Engine) -> None:
    """And nobody has to wait for their trials but they."""
    expected = run(engine, requests())
    given = as_suspects(requests(), 1, 2, 5, 7)
    uncleared: list[set[str]] = []
    schedule = engine.scheduler.schedule

    def watched_schedule() -> StepPlan:
        plan = schedule()
        suspects = {
            chunk.request.request_id
            for chunk in plan.chunks
            if chunk.request.request.is_suspect and chunk.token_index < TRIAL_TOKENS
        }
        uncleared.append(suspects)
        if len(uncleared) == 1:
            assert {chunk.request.request_id for chunk in plan.chunks} >= {"r0", "r1"}
        return plan

    engine.scheduler.schedule = watched_schedule  # type: ignore[method-assign]
    assert run(engine, given) == expected
    assert max(len(suspects) for suspects in uncleared) == 1
    assert set().union(*uncleared) == {"r1", "r2", "r5", "r7"}


def test_a_suspect_that_fails_a_step_is_refused_alone(engine: Engine) -> None:
    expected = run(engine, requests())
    fail_where(engine, is_poisoned)
    results = run(engine, as_suspects(requests(2), 2, 3, 4))
    assert isinstance(results.pop("r2"), EngineFaultError)
    del expected["r2"]
    assert results == expected


def test_an_adapter_that_cannot_be_copied_leaves_other_suspects_on_trial(
    engine: Engine, paths: dict[str, Path]
) -> None:
    expected = run(engine, requests())
    engine.drop_adapter("b")
    packed = pack(engine, paths, "b")
    engine.add_adapter(replace(packed, pages=packed.pages[..., :7]))
    results = run(engine, as_suspects(requests(), 0, 1, 2, 3))
    for index in range(9):
        result = results[f"r{index}"]
        if index % 3 == 2:
            assert isinstance(result, EngineFaultError) and "adapter" in str(result)
        else:
            assert result == expected[f"r{index}"]


def test_a_suspect_that_is_left_before_its_trial(engine: Engine) -> None:
    given = as_suspects(requests(), 0, 1, 2)
    for request in given:
        engine.add_request(request)
    engine.step()
    assert engine.stats().num_waiting >= 2
    for name in ("r2", "r0"):
        assert engine.abort(name)
    others = [request for request in given if request.request_id not in ("r0", "r2")]
    results = finish(engine, others)
    assert not any(isinstance(result, Exception) for result in results.values())
