"""Engines whose steps fail when a test says so, and what they are asked meanwhile."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import torch

from kernels import torch_ops
from slora_core.adapters.page_layout import PackedAdapter
from slora_core.adapters.peft_weights import load_packed_adapter
from slora_core.engine.engine import Engine
from slora_core.engine.recovery import StepFailedError
from slora_core.errors import SLoRAError
from slora_core.execution.step_handle import StepHandle
from slora_core.requests import FinishReason, Request, SamplingParams, StepPlan
from tests.factories import make_model, make_random_adapter

MAX_TOKENS = 8
# No other prompt has it.
POISON = 77
PAGE_TOKENS = 8
Fails = Callable[[StepPlan], bool]


def make_paths(root: Path) -> dict[str, Path]:
    """A tiny model and its adapters "a" and "b"."""
    model = make_model(root / "model", "llama", seed=4)
    adapters = {name: make_random_adapter(root / name, model, seed=ord(name)) for name in "ab"}
    return {"model": model, **adapters}


class FailingOps:
    """The torch twins, of which one raises when `fails` says so, in the middle of a step."""

    def __init__(self) -> None:
        self.fails: Callable[[], bool] = lambda: False

    def module(self) -> ModuleType:
        ops = SimpleNamespace(**vars(torch_ops))
        ops.silu_mul = self._silu_mul
        return cast(ModuleType, ops)

    def _silu_mul(self, *args: Any, **kwargs: Any) -> Any:
        if self.fails():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch_ops.silu_mul(*args, **kwargs)


def pack(engine: Engine, paths: dict[str, Path], name: str) -> PackedAdapter:
    return replace(load_packed_adapter(paths[name], engine.geometry), adapter_id=name)


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


def is_poisoned(plan: StepPlan) -> bool:
    return any(POISON in chunk.request.prompt_ids for chunk in plan.chunks)


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
        raise StepFailedError(plan, MemoryError("no memory for this step"), None)

    engine._run = failing_run  # type: ignore[method-assign]
    return failed


def count_failures(engine: Engine) -> Callable[[], int]:
    after_failure, failures = engine._recovery.after_failure, []

    def count(failure: StepFailedError) -> None:
        failures.append(failure)
        after_failure(failure)

    engine._recovery.after_failure = count  # type: ignore[method-assign]
    return lambda: len(failures)


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
