"""What requests with short prompts lose to a long prompt that came before them, and it to them.

Beside `figures`; its requests are of the base model.
"""

import statistics
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.engine.driver import EngineDriver, Timing
from benchmarks.engine.figures import SEED, Figures
from benchmarks.engine.workloads import fixed_batch
from slora_core.requests import Request

# Of each answer, so that the first ones decode beside the prompts that are still computed.
NUM_TOKENS = 16


def behind_long_prompt(
    driver: EngineDriver, num_short: int, short_len: int, long_len: int
) -> Figures:
    """Time and steps to the first token: of each kind alone, then of all, the long prompt first."""
    short = fixed_batch([None] * num_short, short_len, NUM_TOKENS, driver.vocab_size, SEED)
    long = fixed_batch([None], long_len, NUM_TOKENS, driver.vocab_size, SEED + 1)
    # Two steps of the long prompt are as good as all to warm up.
    two_steps = 2 * driver.engine.config.max_batched_tokens
    driver.run(short)
    driver.run([replace(long[0], prompt_ids=long[0].prompt_ids[:two_steps])])
    short_alone = _at_once(driver, short)
    long_alone = _at_once(driver, long)
    first, *behind = _at_once(driver, [*long, *short])
    return {
        "num_short": num_short,
        "short_len": short_len,
        "long_len": long_len,
        **_medians("short_alone", short_alone),
        **_medians("short", behind),
        **_medians("long_alone", long_alone),
        **_medians("long", [first]),
        "long_to_alone": first.ttft_s / long_alone[0].ttft_s,
    }


def _at_once(driver: EngineDriver, requests: Sequence[Request]) -> list[Timing]:
    return driver.run_open_loop(requests, [0.0] * len(requests))


def _medians(kind: str, timings: Sequence[Timing]) -> Figures:
    return {
        f"{kind}_ttft_p50_ms": 1e3 * statistics.median(t.ttft_s for t in timings),
        f"{kind}_steps_p50": statistics.median(
            t.first_token_step - t.arrival_step for t in timings
        ),
    }
