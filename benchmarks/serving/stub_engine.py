"""An engine that computes nothing: `slora_core.engine.main` with steps of a fixed time.

Requests, pages, adapters, recovery and messages are the real engine's; a step takes `step_s`
instead of a model's time, and gives the tokens of `stub_tokens`. `stub_app` serves it. It measures
and tests what is around an engine, and dies of a request where that is wanted.
"""

import ctypes
import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

from benchmarks.serving.stub_tokens import StubVocabulary, answer_key
from slora_core.dtypes import torch_dtype
from slora_core.engine.engine import Engine
from slora_core.engine.main import serve_engine
from slora_core.engine.protocol import EngineSpec
from slora_core.models.registry import load_model_config
from slora_core.models.weights import allocate_weights
from slora_core.requests import RequestState, ScheduledChunk, StepOutput, StepPlan

# prctl(2): by how many nanoseconds the kernel may wake a thread late.
_PR_SET_TIMERSLACK = 29


@dataclass(frozen=True)
class StubSpec(EngineSpec):
    """What a stubbed engine process is started with."""

    # What a step takes from its plan to its tokens, seconds.
    step_s: float = 0.01
    # Where a prompt has this token, the process ends by SIGSEGV in the step that would give the
    # answer's token of index `crash_at`, or a later one; None: nowhere.
    crash_token_id: int | None = None
    crash_at: int = 0


class StubEngine(Engine):
    """Plans steps, and waits instead of computing them."""

    def __init__(self, spec: StubSpec) -> None:
        model = load_model_config(Path(spec.model_path))
        # Its tensors have a shape and no memory.
        config = replace(spec.engine, device="meta")
        weights = allocate_weights(model, config.device, torch_dtype(config.dtype))
        super().__init__(model, config, weights)
        self._spec = spec
        self._vocabulary = StubVocabulary(model.vocab_size, model.eos_token_ids)
        self._answers: WeakKeyDictionary[RequestState, _Answer] = WeakKeyDictionary()
        self._began_at = 0.0
        # When the steps that were launched will have been computed.
        self._idle_at = 0.0

    def step(self) -> StepOutput:
        self._began_at = time.monotonic()
        return super().step()

    def _run(self, plan: StepPlan) -> "StubStep":
        token_ids = [self._token(chunk) for chunk in plan.chunks if chunk.samples]
        self._idle_at = max(self._idle_at, self._began_at) + self._spec.step_s
        return StubStep(token_ids, self._idle_at)

    def _token(self, chunk: ScheduledChunk) -> int:
        request, index = chunk.request, chunk.token_index
        answer = self._answers.get(request)
        if answer is None:
            answer = self._answers[request] = _Answer(
                answer_key(request.prompt_ids, request.adapter_id, request.sampling),
                self._spec.crash_token_id in request.prompt_ids,
            )
        if answer.is_deadly and index >= self._spec.crash_at:
            os.kill(os.getpid(), signal.SIGSEGV)
        return self._vocabulary.token(answer.key, index)


class _Answer(NamedTuple):
    key: bytes
    # Whether the process ends over it.
    is_deadly: bool


class StubStep:
    """In place of a `StepHandle`: tokens that are there at a time."""

    def __init__(self, token_ids: list[int], done_at: float) -> None:
        self._token_ids = token_ids
        self._done_at = done_at

    def token_ids(self) -> list[int]:
        time.sleep(max(0.0, self._done_at - time.monotonic()))
        return self._token_ids


def main() -> None:
    # Else each sleep lasts 50 us longer.
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)
    serve_engine(StubEngine)


if __name__ == "__main__":
    main()
