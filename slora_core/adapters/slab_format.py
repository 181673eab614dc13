"""How a node's packed adapters lie in shared memory: what the store writes and engines read.

An extent begins with one memory page of header, magic and token, by which a reader can tell it from
whatever later takes the same pid and descriptor. Packed adapters follow, in page order. Knows no
leases and no allocation; the application's host store owns those.
"""

import mmap
from dataclasses import dataclass

import torch

from slora_core.adapters.page_layout import AdapterGeometry, AdapterLayout

HEADER_BYTES = mmap.PAGESIZE
_MAGIC = b"slora-slab-1\0"


@dataclass(frozen=True)
class ExtentId:
    """Where another process of the node finds an extent: /proc/`pid`/fd/`fd`, `token` inside."""

    pid: int
    fd: int
    token: str


@dataclass(frozen=True)
class AdapterLocation:
    """Where a leased adapter lies in the node's slab; small, and safe to send anywhere."""

    adapter_id: str
    layout: AdapterLayout
    extent: ExtentId
    # Bytes of the whole extent, header included; what a reader maps.
    extent_bytes: int
    # Byte offset of page 0 in the extent.
    offset: int


def header(token: str) -> bytes:
    """What the first bytes of an extent with this token are."""
    return _MAGIC + token.encode()


def view_pages(
    geometry: AdapterGeometry,
    layout: AdapterLayout,
    memory: mmap.mmap | memoryview,
    offset: int = 0,
) -> torch.Tensor:
    """Pages [num_pages, num_layers, page_elems] of mapped memory from byte `offset`, no copy.

    The tensor keeps the mapping alive.
    """
    shape = (layout.num_pages, geometry.num_layers, geometry.page_elems)
    elems = layout.num_pages * geometry.num_layers * geometry.page_elems
    flat = torch.frombuffer(memory, dtype=geometry.dtype, count=elems, offset=offset)
    return flat.view(shape)
