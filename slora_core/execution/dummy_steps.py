"""Steps of prompts that nobody sent: for what is measured or compiled before the first request."""

from slora_core.config import EngineConfig
from slora_core.memory.page_pool import pages_for
from slora_core.models.config import ModelConfig
from slora_core.requests import Request, RequestState, SamplingParams, StepPlan


def prompt_step(
    model: ModelConfig, engine: EngineConfig, num_tokens: int, adapter_slot: int = -1
) -> StepPlan:
    """Prompts of together `num_tokens` tokens, each as long as may be, on the first pages.

    Of fewer tokens where the pool ends, or where more requests would be needed than run at once.
    """
    context_len, page_tokens = engine.context_len(model), engine.page_tokens
    plan = StepPlan()
    left, first_page = num_tokens, 0
    for table_idx in range(engine.max_running_requests):
        length = min(left, context_len)
        if engine.num_pool_tokens is not None:
            length = min(length, (engine.num_pages - first_page) * page_tokens)
        if length <= 0:
            break
        request = RequestState(
            Request([0] * length, SamplingParams(temperature=0.0)),
            adapter_slot=adapter_slot,
            table_idx=table_idx,
        )
        last_page = first_page + pages_for(length, page_tokens)
        request.page_ids = list(range(first_page, last_page))
        plan.add(request, length)
        left, first_page = left - length, last_page
    return plan


def num_step_pages(plan: StepPlan) -> int:
    return sum(len(chunk.request.page_ids) for chunk in plan.chunks)
