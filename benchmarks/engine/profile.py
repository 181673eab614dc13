"""What the host and the GPU do in decode steps: kernels by name, and whether the host ever waits.

Knows an `EngineDriver` and reads torch's profiler; `backend` calls it.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd import DeviceType

from benchmarks.engine.driver import EngineDriver
from benchmarks.engine.figures import SEED, Figures, round_robin
from benchmarks.engine.workloads import fixed_batch

# Calls that hold the host up until the device has come so far, or may.
BLOCKING_CALLS = (
    "cudaDeviceSynchronize",
    "cudaStreamSynchronize",
    "cudaMemcpy",
    "cudaMalloc",
    "cudaFree",
    "cudaHostAlloc",
    "cudaMallocHost",
    "cudaFreeHost",
    "cudaHostRegister",
    "cuCtxSynchronize",
    "cuStreamSynchronize",
    "cuModuleLoadData",
)
EVENT_WAIT = "cudaEventSynchronize"
GRAPH_LAUNCH = "cudaGraphLaunch"
STEPS = "steady decode steps"


class Event(NamedTuple):
    """An event of the profiler; times in microseconds."""

    name: str
    start_us: float
    end_us: float
    on_host: bool


def sync_free(
    driver: EngineDriver,
    batch: int,
    num_adapters: int,
    prompt_len: int,
    num_steps: int,
    trace: Path | None,
) -> Figures:
    """Decode steps without a wait of the host for the device but for the oldest step's tokens.

    Shown twice: torch raises an error at whatever it knows to wait, and in as many more steps the
    profiler counts the CUDA calls, those that torch does not look at among them. The wait that is
    left is for the event of the oldest step in flight, whose tokens the host reads.

    Args:
        trace: where the profiler's trace is written, for a browser.
    """
    # Those that are prefilled first decode until the last ones are.
    _start_decoding(driver, batch, num_adapters, prompt_len, 2 * num_steps + 64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(num_steps):
            driver.engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        # The profiler itself waits for the device, before and after.
        driver.engine.step()
        with torch.profiler.record_function(STEPS):
            for _ in range(num_steps):
                driver.engine.step()
    driver.finish()
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    return {"num_steps": num_steps, **waits(_events(profiler.events()), num_steps)}


def waits(events: Sequence[Event], num_steps: int) -> Figures:
    """How often the host waited, or could have, within the span of the steps."""
    [span] = [e for e in events if e.name == STEPS and e.on_host]
    calls = Counter(
        e.name
        for e in events
        if e.on_host and span.start_us <= e.start_us and e.end_us <= span.end_us
    )
    blocking = {name: calls[name] for name in BLOCKING_CALLS if calls[name]}
    # A copy between the device and memory that is not pinned is staged by the host.
    num_pageable = sum("Pageable" in e.name for e in events)
    num_waits = calls[EVENT_WAIT]
    return {
        # Without the launches of graphs the profiler saw nothing.
        "sync_free": not blocking
        and not num_pageable
        and num_waits <= num_steps
        and calls[GRAPH_LAUNCH] == num_steps,
        "num_graph_launches": calls[GRAPH_LAUNCH],
        "num_event_waits": num_waits,
        "num_pageable_copies": num_pageable,
        "blocking_calls": blocking,
    }


def profile(driver: EngineDriver, batch: int, num_adapters: int, path: Path) -> None:
    """Write what the GPU does in eight decode steps, kernel by kernel, to `path`."""
    _start_decoding(driver, batch, num_adapters, prompt_len=512, num_tokens=16)
    driver.settle()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(8):
            driver.engine.step()
        driver.settle()
    driver.finish()
    table = profiler.key_averages().table(
        sort_by="cuda_time_total", row_limit=40, max_name_column_width=90
    )
    with path.open("a") as file:
        file.write(f"8 decode steps, batch {batch}, {num_adapters} adapters\n{table}\n")


def _start_decoding(
    driver: EngineDriver, batch: int, num_adapters: int, prompt_len: int, num_tokens: int
) -> None:
    """Prefill requests of so many output tokens, and go some steps on."""
    adapters = round_robin(batch, num_adapters)
    requests = fixed_batch(adapters, prompt_len, num_tokens, driver.vocab_size, SEED)
    driver.prefill(driver.add(requests))
    for _ in range(4):
        driver.engine.step()


def _events(events: Iterable[torch.autograd.profiler_util.FunctionEvent]) -> list[Event]:
    return [
        Event(e.name, e.time_range.start, e.time_range.end, e.device_type == DeviceType.CPU)
        for e in events
    ]
