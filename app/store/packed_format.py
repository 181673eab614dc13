"""What a packed adapter's file holds: a header that says what it is, then its pages.

Owns the bytes and how damage is seen, by checksums of the header and of the pages. Which files
there are is `packed_files`'s. The checksum is CRC-32, which finds what disks and half-done writes
do; who may write to the directory is trusted. It runs at memory speed on any processor (7.2 GB/s
where SHA-256 makes 2.2, and that only by instructions of its own) and is checked at every read.
"""

import json
import mmap
import os
import struct
import zlib
from dataclasses import dataclass
from io import FileIO

import torch

from slora_core.adapters.page_layout import AdapterLayout

# To be raised with every change of this format or of the page stream (`page_layout`).
FORMAT = 1
_MAGIC = b"slora-packed"
# Magic, format, bytes of the JSON that follows, CRC-32 of it.
_PREFIX = struct.Struct("<12sIII")
# Of an adapter of all modules in hundreds of layers; a length beyond it is damage.
_MAX_JSON_BYTES = 1 << 24
# Bytes read or written at a time: what was read is still in the processor's cache when it is
# summed.
_PIECE_BYTES = 1 << 20


class DamagedFileError(Exception):
    """A file that is not, or not all of, what was written; it can only be deleted."""


@dataclass(frozen=True)
class PackedHeader:
    """What a file holds."""

    adapter_id: str
    geometry_key: str
    layout: AdapterLayout
    # Of the pages.
    nbytes: int
    crc32: int


def encode_header(header: PackedHeader) -> bytes:
    """The file's bytes up to its pages, whole memory pages of them."""
    layout = header.layout
    content = {
        "adapter_id": header.adapter_id,
        "geometry": header.geometry_key,
        "num_pages": layout.num_pages,
        "max_rank": layout.max_rank,
        "offsets": layout.offsets.tolist(),
        # Python's floats hold a float32 exactly, and JSON holds those.
        "scaling": layout.scaling.tolist(),
        "nbytes": header.nbytes,
        "crc32": header.crc32,
    }
    text = json.dumps(content, separators=(",", ":")).encode()
    start = _PREFIX.pack(_MAGIC, FORMAT, len(text), zlib.crc32(text)) + text
    return start.ljust(pages_offset(len(text)), b"\0")


def pages_offset(json_bytes: int) -> int:
    """Where pages begin: at a memory page, so that the kernel can copy them as they lie."""
    return -(-(_PREFIX.size + json_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE


class PackedFile:
    """One packed adapter, in a file that is open at its beginning."""

    def __init__(self, file: FileIO, adapter_id: str, geometry_key: str, page_bytes: int) -> None:
        """Read the header.

        Raises:
            DamagedFileError: it is no whole header, or one of another adapter or geometry.
            OSError: the disk does not give it.
        """
        self._file = file
        try:
            header, self._pages_offset = _read_header(file)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DamagedFileError(f"its header is not understood: {error!r}") from error
        if (header.adapter_id, header.geometry_key) != (adapter_id, geometry_key):
            raise DamagedFileError(
                f"it is of adapter {header.adapter_id} in geometry {header.geometry_key}"
            )
        if header.nbytes != header.layout.num_pages * page_bytes:
            raise DamagedFileError(f"it has {header.nbytes} bytes of pages")
        self._header = header

    @property
    def layout(self) -> AdapterLayout:
        return self._header.layout

    def read_into(self, pages: memoryview) -> None:
        """Read the pages to where they are to be, and check them.

        Raises:
            DamagedFileError: they are not what was written.
            OSError: the disk does not give them. What is in `pages` is worthless with either.
        """
        assert len(pages) == self._header.nbytes
        self._file.seek(self._pages_offset)
        crc32 = 0
        for start in range(0, len(pages), _PIECE_BYTES):
            piece = pages[start : start + _PIECE_BYTES]
            _read_all(self._file, piece)
            crc32 = zlib.crc32(piece, crc32)
        if crc32 != self._header.crc32:
            raise DamagedFileError("its pages are damaged")


def write_all(fd: int, piece: memoryview) -> None:
    """Write `piece`, in as many calls as it takes."""
    while piece:
        piece = piece[os.write(fd, piece[:_PIECE_BYTES]) :]


def _read_header(file: FileIO) -> tuple[PackedHeader, int]:
    """The header of a file, and where its pages begin."""
    prefix = bytearray(_PREFIX.size)
    _read_all(file, memoryview(prefix))
    magic, number, json_bytes, crc32 = _PREFIX.unpack(prefix)
    if (magic, number) != (_MAGIC, FORMAT) or json_bytes > _MAX_JSON_BYTES:
        raise DamagedFileError("it is no packed adapter of this format")
    text = bytearray(json_bytes)
    _read_all(file, memoryview(text))
    if zlib.crc32(text) != crc32:
        raise DamagedFileError("its header is damaged")
    content = json.loads(text)
    layout = AdapterLayout(
        num_pages=content["num_pages"],
        max_rank=content["max_rank"],
        offsets=torch.tensor(content["offsets"], dtype=torch.int32),
        scaling=torch.tensor(content["scaling"], dtype=torch.float32),
    )
    header = PackedHeader(
        content["adapter_id"], content["geometry"], layout, content["nbytes"], content["crc32"]
    )
    return header, pages_offset(json_bytes)


def _read_all(file: FileIO, piece: memoryview) -> None:
    """Fill `piece`.

    Raises:
        DamagedFileError: the file ends before.
    """
    while piece:
        count = file.readinto(piece)
        if not count:
            raise DamagedFileError("it ends too early")
        piece = piece[count:]
