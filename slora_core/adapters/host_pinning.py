"""Registers mapped host memory with CUDA, so that copies from it go by DMA beside the steps."""

import ctypes
import logging
import threading
from functools import partial

import torch

from slora_core.adapters.slab_reader import SlabMemory

logger = logging.getLogger(__name__)


def pin_in_background(memory: SlabMemory) -> None:
    """Register a whole mapping, in a thread: it takes 0.6 to 0.8 s a GiB.

    Until then, and where it fails, copies from the mapping work too, through a staging buffer and
    at a third of the speed. The registration ends with the mapping.
    """
    threading.Thread(target=_pin, args=(memory,), name="host-pinning", daemon=True).start()


def _pin(memory: SlabMemory) -> None:
    # Not kept: an exported buffer would keep the mapping alive.
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    error = int(torch.cuda.cudart().cudaHostRegister(address, len(memory), 0))
    if error:
        logger.warning(
            "%d bytes of host memory could not be registered with CUDA (error %d); adapters are "
            "copied from it more slowly",
            len(memory),
            error,
        )
        return
    # The driver must hear of it while the address is still this memory's.
    memory.before_unmap = partial(_unpin, address)


def _unpin(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
