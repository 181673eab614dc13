"""Steps that fail while little room is left and requests come and go: texts stay what they are."""

import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from slora_core.config import EngineConfig
from slora_core.engine.engine import Engine
from slora_core.errors import EngineFaultError, SLoRAError
from slora_core.requests import FinishReason, Request, SamplingParams, StepPlan
from tests.slora_core.engine.failing_steps import PAGE_TOKENS, fail_where, make_paths, pack, run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_paths(tmp_path_factory.mktemp("recovery"))


@dataclass
class Trouble:
    """An engine with little room, requests that come and leave, and steps that fail, by a seed."""

    paths: dict[str, Path]
    rng: random.Random

    def make_engine(self) -> Engine:
        config = EngineConfig(
            num_pool_tokens=self.rng.choice([200, 280, 400]),
            page_tokens=PAGE_TOKENS,
            max_batched_tokens=self.rng.choice([16, 48]),
            max_running_requests=self.rng.choice([4, 8]),
            max_inflight_steps=self.rng.choice([1, 2]),
            admission_output_tokens=self.rng.choice([0, 4, None]),
        )
        engine = Engine.from_pretrained(self.paths["model"], config)
        for name in "ab":
            engine.add_adapter(pack(engine, self.paths, name))
        return engine

    def make_requests(self) -> list[Request]:
        made = []
        for index in range(14):
            prompt = [5 + index % 2] * self.rng.choice([3, 17, 24])
            prompt += [9 + index] * self.rng.randint(1, 20)
            sampling = SamplingParams(
                max_tokens=self.rng.randint(1, 20),
                temperature=index % 3 / 2,
                seed=index,
                ignore_eos=True,
                # Admitted though its max_tokens might not fit.
                stop=("never",),
            )
            adapter_id = self.rng.choice([None, "a", "b"])
            made.append(Request(prompt, sampling, adapter_id, request_id=f"r{index}"))
        return made

    def serve(self, engine: Engine, given: list[Request]) -> tuple[dict, dict, set[str]]:
        """Tokens and ending of each, and who left; others come while some run."""
        waiting, tokens = list(given), {request.request_id: [] for request in given}
        endings: dict[str, FinishReason | SLoRAError] = {}
        left: set[str] = set()
        while engine.has_work or waiting:
            if waiting and (len(waiting) > 6 or self.rng.random() < 0.3):
                engine.add_request(waiting.pop())
            if self.rng.random() < 0.05:
                leaving = self.rng.choice(given).request_id
                left |= {leaving} if engine.abort(leaving) else set()
            output = engine.step()
            for request_id, token_id in zip(output.request_ids, output.token_ids, strict=True):
                tokens[request_id].append(token_id)
            endings |= output.endings
            engine.check_integrity()
        return tokens, endings, left


@pytest.mark.parametrize("seed", range(24))
def test_whatever_else_goes_on_texts_are_the_same(paths: dict[str, Path], seed: int) -> None:
    """Preemption, eviction, shared prefixes, aborts; half the time one request is to blame."""
    rng = random.Random(seed)
    trouble = Trouble(paths, rng)
    engine, given = trouble.make_engine(), trouble.make_requests()
    expected = run(engine, given)
    poison = rng.choice(given).request_id if seed % 2 else None
    at_step, num_steps = rng.randint(1, 40), 0

    def fails(plan: StepPlan) -> bool:
        nonlocal num_steps
        num_steps += 1
        if poison is None:
            return num_steps == at_step
        return any(chunk.request.request_id == poison for chunk in plan.chunks)

    failed = fail_where(engine, fails)
    tokens, endings, left = trouble.serve(engine, given)
    for name in tokens.keys() - left:
        if name == poison:
            assert isinstance(endings[name], EngineFaultError)
        else:
            assert tokens[name] == expected[name]
    assert failed or poison in left
    assert not engine._recovery.is_going
