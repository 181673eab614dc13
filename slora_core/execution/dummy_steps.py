"""Steps of prompts that nobody sent: for what is measured or compiled before the first request."""

from slora_core.config import EngineConfig, ModelConfig, SamplingParams
from slora_core.memory.sizing import pages_for
from slora_core.types import Request, StepPlan


def prompt_step(
    model: ModelConfig, engine: EngineConfig, num_tokens: int, adapter_slot: int = -1
) -> StepPlan:
    """Prompts of together `num_tokens` tokens, each as long as may be, on the first pages.

    Of fewer tokens where more requests would be needed than run at once.
    """
    context_len = engine.context_len(model)
    plan = StepPlan()
    first_page = 0
    for row in range(engine.max_running_requests):
        length = min(num_tokens - row * context_len, context_len)
        if length <= 0:
            break
        request = Request(f"dummy-{row}", [0] * length, SamplingParams(temperature=0.0), row=row)
        request.adapter_slot = adapter_slot
        last_page = first_page + pages_for(length, engine.page_tokens)
        request.page_ids = list(range(first_page, last_page))
        first_page = last_page
        plan.add(request, length)
    return plan


def num_step_pages(plan: StepPlan) -> int:
    return sum(len(chunk.request.page_ids) for chunk in plan.chunks)
