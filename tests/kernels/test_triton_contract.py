"""What `compile_together` and `dependent_launch` use of Triton without a promise that it stays.

A Triton that changes any of it fails here, by the name of what it changed. Interpreted or not: the
kernels below are compiled, for a GPU that need not be there, and never launched.
"""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.language as tl
from triton import JITFunction, knobs

from tests.absent_gpu import compiling_only


def _fill(x_ptr, SIZE: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, SIZE), 1.0)


def _fill_dependent(x_ptr):
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    tl.store(x_ptr, 1.0)


class _Hook:
    """Keeps what it is called with, and answers that nothing is to be compiled."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **arguments: Any) -> bool:
        self.calls.append(arguments)
        return True


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[_Hook]:
    """The hook that Triton asks before it compiles; without a GPU, and with a cache of its own."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert hasattr(knobs.runtime, "jit_cache_hook"), "triton.knobs.runtime.jit_cache_hook is gone"
    hook = _Hook()
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", hook)
    with compiling_only():
        yield hook


def test_nothing_is_hooked_by_default() -> None:
    assert knobs.runtime.jit_cache_hook is None


def test_a_launch_asks_the_hook_before_it_compiles(hook: _Hook) -> None:
    kernel = JITFunction(_fill)
    kernel[(1,)](torch.zeros(16), SIZE=16)
    assert len(hook.calls) == 1, "knobs.runtime.jit_cache_hook is called once for a launch"
    arguments = hook.calls[0]
    assert {"key", "fn", "compile"} <= set(arguments), "keyword arguments of jit_cache_hook"
    assert isinstance(arguments["key"], str), "`key` of jit_cache_hook is a string"
    assert arguments["fn"].jit_function is kernel, "`fn.jit_function` of jit_cache_hook"
    data = arguments["compile"].get("specialization_data")
    assert isinstance(data, str), "`compile['specialization_data']` of jit_cache_hook"
    kernel[(1,)](torch.zeros(16), SIZE=16)
    assert len(hook.calls) == 2, "a launch that jit_cache_hook held back is compiled by the next"
    assert hook.calls[1]["key"] == arguments["key"], "`key` of jit_cache_hook is the same again"


def test_preload_compiles_what_the_hook_was_given(
    hook: _Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = JITFunction(_fill)
    kernel[(1,)](torch.zeros(16), SIZE=16)
    assert list(inspect.signature(kernel.preload).parameters) == ["specialization_data"]
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", None)
    compiled = kernel.preload(hook.calls[0]["compile"]["specialization_data"])
    assert "_fill" in compiled.asm["ptx"], "JITFunction.preload returns what it compiled"
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", hook)
    found = kernel.warmup(torch.zeros(16), SIZE=16, grid=(1,))
    assert found is compiled and len(hook.calls) == 1, "launches find what preload compiled"


def test_a_dependent_launch_waits_where_it_is_told(
    hook: _Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("gdc_launch_dependents", "gdc_wait"):
        assert hasattr(tl.extra.cuda, name), f"triton.language.extra.cuda.{name} is gone"
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", None)
    compiled = JITFunction(_fill_dependent).warmup(torch.zeros(1), grid=(1,), launch_pdl=True)
    assert compiled.metadata.launch_pdl is True, "launch_pdl is an option of a launch"
    ptx = compiled.asm["ptx"]
    start, wait, store = (
        ptx.find(word)
        for word in ("griddepcontrol.launch_dependents", "griddepcontrol.wait", "st.")
    )
    assert 0 <= start < wait < store, "gdc_launch_dependents and gdc_wait stay in their order"
