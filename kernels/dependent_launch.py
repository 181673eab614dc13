"""Programmatic dependent launch: a kernel may start while the one before it in its stream ends.

What it reads that no kernel of the step writes, weights above all, it loads at once; only then
does it wait. On devices that cannot, kernels run as ever. CUDA C++ Programming Guide, section
"Programmatic Dependent Launch and Synchronization".

Triton does not promise what it offers for that: kernels use it by the functions here alone, and
`tests/kernels/triton_contract.py` says what is relied on.
"""

import functools

import torch
import triton
import triton.language as tl

# Compute capability from which devices can: Hopper's.
MIN_CAPABILITY = (9, 0)
# Triton drops checks of integers' overflow that do not assert, but only after it has made them:
# an eighth of the time that compiling holds Python's lock.
DEPENDENT_OPTIONS = {"DEPENDENT": True, "launch_pdl": True, "sanitize_overflow": False}


def launch_options(x: torch.Tensor) -> dict[str, bool]:
    """Arguments of a launch on x's device, of a kernel that has a constant DEPENDENT."""
    if x.is_cuda and _is_able(x.device):
        return DEPENDENT_OPTIONS
    return {"DEPENDENT": False}


@functools.cache
def _is_able(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


@triton.jit
def let_next_start(DEPENDENT: tl.constexpr):
    """The kernel that follows may start once every program of this one has come here or ended."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(DEPENDENT: tl.constexpr):
    """Until what came before has ended; afterwards all that it wrote is seen."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()


@triton.jit
def wait_without_work(DEPENDENT: tl.constexpr):
    """For programs that return early: the grid may not end before those that it follows.

    The kernel after it waits for its end alone, and would else overtake those. One program a grid
    does: the first, which waits in a kernel with work as well, whatever others have none.
    """
    if DEPENDENT:  # noqa: SIM102 (a constant: without it nothing is compiled of what follows)
        # One program keeps the grid from ending; the others make room.
        if tl.program_id(0) + tl.program_id(1) + tl.program_id(2) == 0:
            wait_for_previous(DEPENDENT)
