"""Progress bars that also suit a log: without a terminal, a few whole lines a minute.

Used by what people wait for, here and in the benchmarks. It knows no work; importing it needs tqdm.
"""

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

# Between two lines of a bar that nobody sees grow: four a minute.
LINE_INTERVAL_S = 15.0


class ProgressBar(tqdm):
    """tqdm, which draws many times a second, with the lines of `FewLines` in a file or a pipe."""

    def __init__(self, *args: Any, file: TextIO | None = None, **kwargs: Any) -> None:
        stream = sys.stderr if file is None else file
        super().__init__(*args, file=stream if stream.isatty() else FewLines(stream), **kwargs)


class FewLines:
    """A stream for tqdm that writes the first state of a bar, the last, and few between.

    A line begins where tqdm would go back to the begin of the one before.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._due_at = float("-inf")
        # The state that has not been written.
        self._left_out = ""

    @property
    def encoding(self) -> str:
        return self._stream.encoding

    def write(self, text: str) -> None:
        state = text.strip()
        if state:
            self._left_out = state
            if self._clock() >= self._due_at:
                self._write_line()
        # How tqdm leaves a bar that it closes.
        elif text.endswith("\n") and self._left_out:
            self._write_line()

    def flush(self) -> None:
        self._stream.flush()

    def _write_line(self) -> None:
        self._stream.write(self._left_out + "\n")
        self._left_out = ""
        self._due_at = self._clock() + LINE_INTERVAL_S
