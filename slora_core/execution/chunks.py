"""What a step's chunks are, seen as rows."""

from collections.abc import Sequence

from slora_core.requests import ScheduledChunk


def is_plain_decode(chunk: ScheduledChunk) -> bool:
    """One row that samples; a prompt's part of one token is a decode row that does not."""
    return chunk.is_decode and chunk.samples


def slot_runs(chunks: Sequence[ScheduledChunk]) -> tuple[list[int], list[int]]:
    """Runs of rows of one adapter, or of the base model: bounds [runs + 1] and slots [runs].

    Without chunks, one run of no rows of the base model.
    """
    bounds, slots = [0], [chunks[0].slot] if chunks else [-1]
    row = 0
    for chunk in chunks:
        if chunk.slot != slots[-1]:
            bounds.append(row)
            slots.append(chunk.slot)
        row += chunk.end - chunk.start
    bounds.append(row)
    return bounds, slots


def logit_rows(chunks: Sequence[ScheduledChunk]) -> list[int]:
    """The last row of each chunk that samples."""
    rows: list[int] = []
    end = 0
    for chunk in chunks:
        end += chunk.end - chunk.start
        if chunk.samples:
            rows.append(end - 1)
    return rows
