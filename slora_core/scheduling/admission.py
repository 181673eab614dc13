"""Peak-page admission: how many KV pages the running requests will need at their worst moment.

Pure arithmetic over lengths. Source: the peak-memory estimate of LightLLM's router, which S-LoRA
(Sheng et al., 2023) builds on, counted in pages here.
"""

from collections.abc import Iterable

from slora_core.config import EngineConfig
from slora_core.types import Request


def expected_total_tokens(request: Request, config: EngineConfig) -> int:
    """Prompt + output tokens the request is assumed to reach, at least one more than it has."""
    limit = request.max_total_tokens
    if config.admission_output_tokens is None:
        return limit
    expected = len(request.prompt_ids) + config.admission_output_tokens
    return min(limit, max(expected, request.num_tokens + 1))


def peak_kv_pages(requests: Iterable[Request], config: EngineConfig) -> int:
    """Upper bound of the KV pages held at once if every request runs to its expected end.

    A request's pages are freed when it ends, so the peak is reached just before some request
    ends: with requests by remaining tokens descending, when the i-th ends the first i + 1 still
    run, each having grown by the i-th's remaining tokens and wasting less than a page.
    """
    lengths = sorted(
        (
            (expected_total_tokens(request, config) - request.num_tokens, request.num_tokens)
            for request in requests
        ),
        reverse=True,
    )
    peak = held_tokens = 0
    for count, (remaining, num_tokens) in enumerate(lengths, start=1):
        held_tokens += num_tokens
        rounded_up = held_tokens + count * (remaining + config.page_tokens - 1)
        peak = max(peak, rounded_up // config.page_tokens)
    return peak
