"""What `compile_together` and `dependent_launch` use of Triton without a promise that it stays.

A program of its own, without a GPU: the interpreter leaves builtins behind that do not compile.
A Triton that changes any of it fails here, by the name of what it changed.
"""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from triton import JITFunction, knobs

from kernels.dependent_launch import DEPENDENT_OPTIONS
from tests.absent_gpu import pretend_gpu


@triton.jit
def _fill(x_ptr, SIZE: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, SIZE), 1.0)


@triton.jit
def _fill_dependent(x_ptr):
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    tl.store(x_ptr, 1.0)


@contextmanager
def _hooked() -> Iterator[list[dict[str, Any]]]:
    """Inside, nothing is compiled that a launch lacks; the arguments of the hook each time."""
    calls = []

    def hook(**arguments: Any) -> bool:
        calls.append(arguments)
        return True

    knobs.runtime.jit_cache_hook = hook
    yield calls
    knobs.runtime.jit_cache_hook = None


def check_the_hook_is_unused() -> None:
    assert hasattr(knobs.runtime, "jit_cache_hook"), "triton.knobs.runtime.jit_cache_hook is gone"
    assert knobs.runtime.jit_cache_hook is None, "jit_cache_hook has a default"


def check_a_launch_asks_the_hook_before_it_compiles() -> None:
    with _hooked() as calls:
        for _ in range(2):
            _fill[(1,)](torch.zeros(16), SIZE=16)
    assert len(calls) == 2, "jit_cache_hook is called once a launch, until it lets one compile"
    first, second = calls
    assert {"key", "fn", "compile"} <= set(first), "keyword arguments of jit_cache_hook"
    assert isinstance(first["key"], str), "`key` of jit_cache_hook is a string"
    assert first["key"] == second["key"], "`key` of jit_cache_hook is the same for the same launch"
    assert first["fn"].jit_function is _fill, "`fn.jit_function` of jit_cache_hook is the kernel"
    data = first["compile"].get("specialization_data")
    assert isinstance(data, str), "`compile['specialization_data']` of jit_cache_hook is a string"


def check_launches_find_what_preload_compiled() -> None:
    parameters = list(inspect.signature(JITFunction.preload).parameters)
    assert parameters == ["self", "specialization_data"], "arguments of JITFunction.preload"
    with _hooked() as calls:
        _fill[(1,)](torch.zeros(32), SIZE=32)
    compiled = _fill.preload(calls[0]["compile"]["specialization_data"])
    assert "_fill" in compiled.asm["ptx"], "JITFunction.preload returns what it compiled"
    with _hooked() as calls:
        found = _fill.warmup(torch.zeros(32), SIZE=32, grid=(1,))
    assert found is compiled and not calls, "launches find what JITFunction.preload compiled"


def check_a_dependent_launch_waits_where_it_is_told() -> None:
    for name in ("gdc_launch_dependents", "gdc_wait"):
        assert hasattr(tl.extra.cuda, name), f"triton.language.extra.cuda.{name} is gone"
    options = {**DEPENDENT_OPTIONS}
    del options["DEPENDENT"]
    compiled = _fill_dependent.warmup(torch.zeros(1), grid=(1,), **options)
    for name, value in options.items():
        assert getattr(compiled.metadata, name) is value, f"{name} is an option of a launch"
    words = "griddepcontrol.launch_dependents", "griddepcontrol.wait", "st.global"
    places = [compiled.asm["ptx"].find(word) for word in words]
    assert -1 < places[0] < places[1] < places[2], f"order of {words}: {places}"


CHECKS = (
    check_the_hook_is_unused,
    check_a_launch_asks_the_hook_before_it_compiles,
    check_launches_find_what_preload_compiled,
    check_a_dependent_launch_waits_where_it_is_told,
)


def main() -> None:
    """Write the name of each check that passed."""
    pretend_gpu()
    for check in CHECKS:
        check()
        sys.stdout.write(f"{check.__name__}\n")


if __name__ == "__main__":
    main()
