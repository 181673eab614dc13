"""A step as one message: small, quickly made and read, and the same step where it arrives."""

import pickle
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slora_core.adapters.peft_weights import load_packed_adapter
from slora_core.attention.planner import AttentionPlanner
from slora_core.config import EngineConfig
from slora_core.engine.engine import Engine
from slora_core.execution.step_builder import StepBuilder
from slora_core.execution.step_inputs import StepInputs
from slora_core.requests import Request, SamplingParams, StepPlan
from tests.factories import ALL_MODULES, make_model, make_random_adapter
from tests.slora_core.engine.planned_steps import plan_step

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_REQUESTS = 256
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "top_k": 40}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("step_inputs")
    model_dir = make_model(directory / "model", "llama", seed=3)
    for index in range(4):
        make_random_adapter(
            directory / str(index), model_dir, seed=index, target_modules=ALL_MODULES
        )
    return directory


def _engine(directory: Path) -> Engine:
    config = EngineConfig(
        num_pool_tokens=16384, max_batched_tokens=4096, max_running_requests=NUM_REQUESTS
    )
    engine = Engine.from_pretrained(directory / "model", config)
    for index in range(4):
        packed = load_packed_adapter(directory / str(index), engine.geometry)
        engine.add_adapter(replace(packed, adapter_id=str(index)))
    return engine


def _decode_step(engine: Engine, **sampling) -> StepPlan:
    """A step in which 256 requests of the base model and of four adapters decode."""
    for index in range(NUM_REQUESTS):
        settings = SamplingParams(max_tokens=20, seed=index, ignore_eos=True, **sampling)
        adapter_id = None if index % 5 == 4 else str(index % 5)
        engine.add_request(Request([5, 6, 7 + index % 200], settings, adapter_id))
    for _ in range(3):
        engine.step()
    plan = plan_step(engine)
    assert len(plan.chunks) == NUM_REQUESTS
    assert all(chunk.is_decode and chunk.samples for chunk in plan.chunks)
    return plan


def _dumps(inputs: StepInputs) -> bytes:
    return pickle.dumps(inputs, protocol=pickle.HIGHEST_PROTOCOL)


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, SAMPLED], ids=["greedy", "sampled"])
def test_a_step_that_was_sent_gives_the_same_tokens(directory: Path, sampling: dict) -> None:
    engine = _engine(directory)
    plan = _decode_step(engine, **sampling)
    inputs = engine.builder.build(plan.chunks)
    sent = _dumps(inputs)
    received: StepInputs = pickle.loads(sent)
    assert received.shape == inputs.shape and received.shape.lora is not None
    assert (received.num_samples, received.sampling) == (NUM_REQUESTS, inputs.sampling)
    assert received.pages is None and _dumps(received) == sent
    fields = [each.fields.to(torch.device("cpu")) for each in (inputs, received)]
    assert fields[0].keys() == fields[1].keys()
    assert all(torch.equal(fields[0][name], fields[1][name]) for name in fields[0])

    tokens = engine.runner.run(inputs).token_ids()
    assert len(tokens) == NUM_REQUESTS and len(set(tokens)) > 20
    # Writes the same KV to the same places.
    assert engine.runner.run(received).token_ids() == tokens
    # Running it changed nothing of it.
    assert _dumps(inputs) == sent
    engine.scheduler.commit(plan, tokens)
    engine.check_integrity()


def test_tokens_that_the_host_does_not_know_come_from_where_it_is_run(directory: Path) -> None:
    engine = _engine(directory)
    plan = _decode_step(engine, **SAMPLED)
    known = engine.builder.build(plan.chunks)
    pending = [chunk._replace(input_pending=True) for chunk in plan.chunks]
    received: StepInputs = pickle.loads(_dumps(engine.builder.build(pending)))
    rows = received.fields.to(torch.device("cpu"))
    assert rows["input_ids"].tolist() == [-1] * NUM_REQUESTS
    # The last step's tokens are there.
    tokens = engine.runner.run(received).token_ids()
    assert engine.runner.run(known).token_ids() == tokens


@pytest.mark.parametrize("planned", [False, True])
def test_a_decode_step_is_small(directory: Path, planned: bool) -> None:
    """Of the torch twins and of Triton's kernels, with all settings of sampling."""
    engine = _engine(directory)
    plan = _decode_step(engine, **SAMPLED)
    builder = engine.builder
    if planned:
        planner = AttentionPlanner(engine.model, torch.float32)
        builder = StepBuilder(engine.model, engine.config, planner)
        for slot in range(4):
            builder.shapes.adapter_loaded(slot, engine._host_copies[str(slot)].layout)
    inputs = builder.build(plan.chunks)
    sent = _dumps(inputs)
    assert len(sent) < 48 * 1024
    # Greedy, nothing but the fields goes.
    assert len(_dumps(replace(inputs, sampling=None))) < 4 * len(inputs.fields) + 2048

    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        pickle.loads(_dumps(inputs))
        seconds.append(time.perf_counter() - started)
    sys.stdout.write(f"{len(sent)} bytes, {1e6 * min(seconds):.0f} us to pickle and unpickle\n")
