"""What a step's chunks are, seen as rows."""

from collections.abc import Sequence
from itertools import groupby

from slora_core.types import ScheduledChunk


def is_plain_decode(chunk: ScheduledChunk) -> bool:
    """One row that samples; a prompt's part of one token is a decode row that does not."""
    return chunk.is_decode and chunk.samples


def num_runs(chunks: Sequence[ScheduledChunk]) -> int:
    """Runs of rows of one adapter, or of the base model."""
    return sum(1 for _ in groupby(chunks, key=lambda chunk: chunk.slot))


def logit_rows(chunks: Sequence[ScheduledChunk]) -> list[int]:
    """The last row of each chunk that samples."""
    rows: list[int] = []
    end = 0
    for chunk in chunks:
        end += chunk.end - chunk.start
        if chunk.samples:
            rows.append(end - 1)
    return rows


def as_decodes(chunks: Sequence[ScheduledChunk]) -> list[ScheduledChunk]:
    """Chunks of one token each: a token of a prompt attends as a decode does, to all up to itself.

    A step writes the KV of all rows before any row reads it.
    """
    rows = []
    for chunk in chunks:
        if chunk.end - chunk.start == 1:
            rows.append(chunk)
            continue
        for end in range(chunk.start + 1, chunk.end + 1):
            last = end == chunk.end
            rows.append(chunk._replace(start=end - 1, end=end, samples=last and chunk.samples))
    return rows
