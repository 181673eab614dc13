"""A step that fails costs the request that it is to be blamed on its answer, and nobody else's."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slora_core.adapters.peft_weights import load_packed_adapter
from slora_core.config import EngineConfig
from slora_core.engine.engine import Engine
from slora_core.errors import EngineFaultError, SLoRAError
from slora_core.execution.step_handle import StepHandle
from slora_core.requests import FinishReason, Request, SamplingParams, StepPlan
from tests.factories import make_model, make_random_adapter

pytestmark = pytest.mark.usefixtures("one_thread")

MAX_TOKENS = 8
# No other prompt has it.
POISON = 77
PAGE_TOKENS = 8
Fails = Callable[[StepPlan], bool]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("recovery")
    model = make_model(root / "model", "llama", seed=4)
    adapters = {name: make_random_adapter(root / name, model, seed=ord(name)) for name in "ab"}
    return {"model": model, **adapters}


@pytest.fixture(params=[1, 2], ids=["one step", "two steps"])
def engine(request, paths: dict[str, Path]) -> Engine:
    config = EngineConfig(
        num_pool_tokens=1024,
        page_tokens=PAGE_TOKENS,
        max_batched_tokens=48,
        max_inflight_steps=request.param,
    )
    engine = Engine.from_pretrained(paths["model"], config)
    for name in "ab":
        packed = load_packed_adapter(paths[name], engine.geometry)
        engine.add_adapter(replace(packed, adapter_id=name))
    return engine


def requests(poison_at: int | None = None) -> list[Request]:
    """Of the base and both adapters, with shared beginnings; greedy and sampled."""
    made = []
    for index in range(9):
        prompt = [5 + index % 2] * 20 + [9 + index] * (1 + 3 * index)
        if index == poison_at:
            prompt[-1] = POISON
        sampling = SamplingParams(
            max_tokens=MAX_TOKENS, temperature=index % 3 / 2, seed=index, ignore_eos=True
        )
        made.append(Request(prompt, sampling, (None, "a", "b")[index % 3], request_id=f"r{index}"))
    return made


def fail_where(engine: Engine, fails: Fails) -> list[list[str]]:
    """Have steps fail that are told by `fails`, with garbage in what they were to write.

    Returns the requests of each one that does, as they come.
    """
    run = engine._run
    failed: list[list[str]] = []

    def failing_run(plan: StepPlan) -> StepHandle:
        if not fails(plan):
            return run(plan)
        failed.append([chunk.request.request_id for chunk in plan.chunks])
        for chunk in plan.chunks:
            first = -(-chunk.start // PAGE_TOKENS)
            for page_id in chunk.request.page_ids[first:]:
                engine.runner.pool[page_id] = torch.nan
        for load in plan.adapter_loads:
            engine.runner.pool[load.page_ids] = torch.nan
        raise MemoryError("no memory for this step")

    engine._run = failing_run  # type: ignore[method-assign]
    return failed


def run(engine: Engine, given: list[Request]) -> dict[str, list[int] | SLoRAError]:
    """The tokens of every request, or the error that it ended with; each is told one ending."""
    for request in given:
        engine.add_request(request)
    return finish(engine, given)


def finish(engine: Engine, given: list[Request]) -> dict[str, list[int] | SLoRAError]:
    tokens: dict[str, list[int]] = {request.request_id: [] for request in given}
    endings: dict[str, FinishReason | SLoRAError] = {}
    while engine.has_work:
        output = engine.step()
        for request_id, token_id in zip(output.request_ids, output.token_ids, strict=True):
            tokens[request_id].append(token_id)
        assert not endings.keys() & output.endings.keys()
        endings |= output.endings
        engine.check_integrity()
    assert endings.keys() == tokens.keys()
    return {
        name: ending if isinstance(ending, SLoRAError) else tokens[name]
        for name, ending in endings.items()
    }


def is_poisoned(plan: StepPlan) -> bool:
    return any(POISON in chunk.request.prompt_ids for chunk in plan.chunks)


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


def test_an_adapter_that_cannot_be_copied_costs_its_own_requests(engine: Engine) -> None:
    expected = run(engine, requests())
    engine.drop_adapter("b")
    fail_where(engine, lambda plan: any(load.adapter_id == "b" for load in plan.adapter_loads))
    results = run(engine, requests())
    for index in range(9):
        if index % 3 == 2:
            assert isinstance(results[f"r{index}"], EngineFaultError)
        else:
            assert results[f"r{index}"] == expected[f"r{index}"]
    assert "b" not in engine.stats().resident_adapters


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
