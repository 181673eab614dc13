"""Compiles Triton kernels side by side: one after another, a start's take minutes.

Triton keeps on disk what is compiled here under other keys than what a launch compiles where
constants are tuples, which it restores as lists: neither finds what the other has left there.

Triton promises neither the hook's arguments nor `preload`: `tests/kernels/triton_contract.py`
says what is relied on, and nobody else uses them.
"""

import gc
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from triton import JITFunction, knobs

# Threads beyond these wait for Python's lock, which a part of the compiler holds.
_MAX_THREADS = 16


@contextmanager
def compile_together() -> Iterator[None]:
    """Inside, launches of kernels that have yet to be compiled do nothing; the end compiles them.

    Kernels that are compiled already run as ever, on what the others did not compute: tensors that
    hold indices must not come from kernels. Triton's interpreter compiles nothing.

    Raises:
        triton.CompilationError: of the first kernel that does not compile.
    """
    # By the key under which a kernel looks for what was compiled.
    missing: dict[tuple[JITFunction[Any], str], str] = {}

    def skip(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        missing[fn.jit_function, key] = compile["specialization_data"]
        return True

    hook = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = skip
    try:
        yield
    finally:
        knobs.runtime.jit_cache_hook = hook
    if not missing:
        return
    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    # The compiler leaves much to search for garbage: what was there before is not searched again
    # and again, with Python's lock held.
    gc.freeze()
    try:
        with ThreadPoolExecutor(
            threads, "triton", torch.cuda.set_device, (torch.cuda.current_device(),)
        ) as pool:
            compiled = [pool.submit(kernel.preload, data) for (kernel, _), data in missing.items()]
    finally:
        gc.unfreeze()
    for future in compiled:
        future.result()
