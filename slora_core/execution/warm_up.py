"""What an engine on a GPU does before its first request: compiles kernels, captures graphs.

So that no request waits for either. It runs steps that nobody sent, on pages that nobody has yet.
"""

import logging
from dataclasses import replace

from slora_core.config import EngineConfig
from slora_core.execution.buckets import warm_up_sizes
from slora_core.execution.dummy_steps import prompt_step
from slora_core.execution.model_runner import ModelRunner
from slora_core.execution.step_builder import StepBuilder
from slora_core.models.config import ModelConfig

logger = logging.getLogger(__name__)


def compile_kernels(
    model: ModelConfig, engine: EngineConfig, builder: StepBuilder, runner: ModelRunner
) -> None:
    """Compile and load all kernels, by the first layer.

    For the base model and each shape of LoRA.
    """
    # Triton is loaded only where it is used.
    from kernels.compile_together import compile_together

    with compile_together():
        run_every_kernel(model, engine, builder, runner)
    run_every_kernel(model, engine, builder, runner)


def capture_graphs(builder: StepBuilder, runner: ModelRunner) -> None:
    """Record small steps of every size, for the base model and LoRA up to `graph_max_rank`."""
    for shape in builder.shapes.graphs():
        runner.capture(builder.build_as([], shape))
    logger.info("captured %d graphs of steps", runner.num_graphs())


def run_every_kernel(
    model: ModelConfig, engine: EngineConfig, builder: StepBuilder, runner: ModelRunner
) -> None:
    """Launch each kernel in all the ways that requests do."""
    shapes, planner = builder.shapes, runner.attention_planner
    sizes = warm_up_sizes(engine.max_batched_tokens)
    for num_tokens in sizes:
        for lora in (None, *shapes.lora_shapes()):
            # With LoRA an empty slot: its kernels find that it has no weights.
            chunks = prompt_step(model, engine, num_tokens, -1 if lora is None else 0).chunks
            shape = replace(shapes.of(chunks), lora=lora)
            runner.launch_kernels(builder.build_as(chunks, shape))
    for block_rows in () if planner is None else planner.prefill_tiles:
        chunks = prompt_step(model, engine, sizes[0]).chunks
        shape = replace(shapes.of(chunks), prefill_block_rows=block_rows)
        runner.launch_kernels(builder.build_as(chunks, shape))
    for shape in shapes.graphs():
        runner.launch_kernels(builder.build_as([], shape))
