"""Steps of an engine taken apart, for tests that look between a plan and its commit."""

from slora_core.engine.engine import Engine
from slora_core.execution.model_runner import ModelRunner
from slora_core.execution.step_builder import StepBuilder
from slora_core.requests import StepPlan


def plan_step(engine: Engine) -> StepPlan:
    """Plan a step and load its adapters, as the engine does before it runs one."""
    plan = engine.scheduler.schedule()
    load_adapters(engine, plan, engine.builder, engine.runner)
    return plan


def load_adapters(
    engine: Engine, plan: StepPlan, builder: StepBuilder, runner: ModelRunner
) -> None:
    """Make the copies that a plan of the engine asks for, in this runner's pool."""
    for load in plan.adapter_loads:
        adapter = engine._host_copies[load.adapter_id]
        builder.shapes.adapter_loaded(load.slot, adapter.layout)
        runner.load_adapter(load, adapter)
