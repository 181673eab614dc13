"""Sizes the unified pool on a GPU: what is left when the largest step has run."""

import dataclasses
import gc
import logging

import torch

from slora_core.config import EngineConfig
from slora_core.dtypes import torch_dtype
from slora_core.errors import UnsupportedModelError
from slora_core.execution.buckets import max_graph_rows
from slora_core.execution.dummy_steps import num_step_pages, prompt_step
from slora_core.execution.model_runner import ModelRunner
from slora_core.execution.sampler import SamplingBatch, sample
from slora_core.execution.step_builder import StepBuilder
from slora_core.execution.step_inputs import SamplingInputs
from slora_core.memory.sizing import page_bytes
from slora_core.models.config import ModelConfig
from slora_core.models.weights import DecoderWeights

logger = logging.getLogger(__name__)

# fp32 copies of the logits of all running requests, at most, that graphs hold: what they write,
# and what they write it from.
_GRAPH_COPIES = 2


def profile_num_pages(model: ModelConfig, engine: EngineConfig, weights: DecoderWeights) -> int:
    """Pages that fit into `memory_utilization` beside weights, activations and logits.

    Runs a step of `max_batched_tokens` on a small pool, and the sampler on as many rows as there
    may be, and counts the peak of each.

    Raises:
        UnsupportedModelError: less than one page is left; the message has the figures.
    """
    device = torch.device(engine.device)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    pool_bytes = _run_largest_step(model, engine, weights)
    activations = torch.cuda.max_memory_allocated(device) - before - pool_bytes
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    # Graphs share memory, beside that of other steps, for the activations of the largest of them.
    activations += activations * max_graph_rows(engine) // engine.max_batched_tokens
    logits = _GRAPH_COPIES * engine.max_running_requests * model.vocab_size * 4
    logits += _sampling_bytes(model, engine)
    available = int(total * engine.memory_utilization) - (total - free) - activations - logits
    num_pages = available // page_bytes(model, engine)
    gib = 2**30
    figures = (
        f"{total / gib:.1f} GiB, of which {engine.memory_utilization:.0%} may be used: "
        f"{(total - free) / gib:.1f} weights and others, {activations / gib:.2f} activations, "
        f"{logits / gib:.2f} logits, {available / gib:.1f} for the pool"
    )
    if num_pages < 1:
        raise UnsupportedModelError(
            f"the model leaves no memory for the pool on {device}: {figures}"
        )
    logger.info(
        "pool of %d pages, %d tokens: %s", num_pages, num_pages * engine.page_tokens, figures
    )
    return num_pages


def _sampling_bytes(model: ModelConfig, engine: EngineConfig) -> int:
    """What it takes at most to sample a token of every running request, logits included."""
    device = torch.device(engine.device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    # As an eager step makes them: in the model's dtype first.
    logits = torch.zeros(
        engine.max_running_requests,
        model.vocab_size,
        dtype=torch_dtype(engine.dtype),
        device=device,
    ).float()
    sample(logits, SamplingBatch.of(_costliest_sampling(engine.max_running_requests), device))
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _costliest_sampling(num_rows: int) -> SamplingInputs:
    """Settings with which every row is sorted."""
    return SamplingInputs(
        temperature=[1.0] * num_rows,
        top_p=[0.9] * num_rows,
        min_p=[0.1] * num_rows,
        top_k=[50] * num_rows,
        seed=[0] * num_rows,
        token_index=[0] * num_rows,
        filtered_rows=list(range(num_rows)),
    )


def _run_largest_step(model: ModelConfig, engine: EngineConfig, weights: DecoderWeights) -> int:
    """Prefill `max_batched_tokens` in requests as long as may be; returns the pool's bytes."""
    plan = prompt_step(model, engine, engine.max_batched_tokens)
    num_pages = num_step_pages(plan)
    num_tokens = num_pages * engine.page_tokens
    small = dataclasses.replace(engine, num_pool_tokens=num_tokens, cuda_graphs=False)
    runner = ModelRunner(model, small, weights, max_slots=1)
    builder = StepBuilder(model, small, runner.attention_planner)
    runner.run(builder.build(plan.chunks)).token_ids()
    return runner.pool.numel() * runner.pool.element_size()
