"""Which steps with prompts are replayed, by the figures of a 7B model in bf16 on an H100."""

import pytest
import torch

from benchmarks.engine_workloads import SHAPES
from slora_core.config import EngineConfig, SamplingParams
from slora_core.execution.step_cost import StepCost
from slora_core.types import Request, ScheduledChunk

COST = StepCost(SHAPES["llama-7b"], EngineConfig(dtype=torch.bfloat16))


def _chunks(*spans: tuple[int, int]) -> list[ScheduledChunk]:
    request = Request("r", [1] * 4096, SamplingParams())
    return [ScheduledChunk(request, *span, True, False, -1) for span in spans]


@pytest.mark.parametrize(
    "num_decodes,span,base,lora",
    [
        # A short prompt on an idle engine, and beside some decodes.
        (0, (0, 64), True, True),
        (32, (0, 64), True, True),
        # The end of a long context costs as much to read again as a long prompt.
        (0, (3000, 3030), False, True),
        (0, (0, 256), False, True),
        (0, (0, 500), False, False),
        # The device is busy anyway for longer than the host takes.
        (128, (0, 64), False, True),
        (240, (0, 64), False, False),
    ],
)
def test_steps(num_decodes: int, span: tuple[int, int], base: bool, lora: bool) -> None:
    chunks = _chunks(*[(500, 501)] * num_decodes, span)
    assert COST.graph_pays(chunks, lora=False) is base
    assert COST.graph_pays(chunks, lora=True) is lora
