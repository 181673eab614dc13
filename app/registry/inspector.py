"""What adapters' files are found to be: one folder, or many at once.

Owns the rules by which files are checked. It knows no registrations; `registry` asks it.
"""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from app.byte_budget import ThreadByteBudget
from app.heap import give_memory_back
from app.registry.names_and_paths import confined_path
from app.registry.state import AdapterRecord, FilesStamp, files_stamp
from slora_core.adapters.adapter_rules import AdapterRules
from slora_core.adapters.page_layout import AdapterGeometry
from slora_core.adapters.peft_weights import WEIGHTS_FILE, inspect_peft_adapter
from slora_core.errors import AdapterChangingError, SLoRAError
from slora_core.text.adapter_text import AdapterText
from slora_core.text.base_text import BaseText
from slora_core.text.folder_text import read_adapter_text

logger = logging.getLogger(__name__)

# How often the files may be found changed while they were read.
MAX_READINGS = 2
# Of weights files that are checked at one time, by scans and loads together; each takes twice its
# size for that. Half a gigabyte keeps 32 cores busy with adapters of a 7B model.
MAX_READING_BYTES = 1 << 29
# Weights files from which on the memory is given back to the system after the check.
LARGE_FILE_BYTES = 1 << 25


@dataclass(frozen=True)
class Inspection:
    """What a folder is; the record's version is the registry's to give."""

    record: AdapterRecord
    stamp: FilesStamp
    # Seconds of reading and hashing its files.
    read_s: float


class AdapterInspector:
    """Args:
    allowed_roots: directories that adapters may come from.
    rules, base_text: what files are checked by; without a text nothing of it is read.
    """

    def __init__(
        self,
        geometry: AdapterGeometry,
        allowed_roots: Sequence[str | Path],
        rules: AdapterRules | None = None,
        base_text: BaseText | None = None,
    ) -> None:
        self.geometry = geometry
        self.allow(allowed_roots)
        self._rules = rules
        self._base_text = base_text
        self._budget = ThreadByteBudget(MAX_READING_BYTES)

    def allow(self, roots: Sequence[str | Path]) -> None:
        """From now on adapters may come from these directories alone."""
        self.roots = [Path(os.path.realpath(root)) for root in roots]

    def confined(self, path: str | Path) -> Path:
        """As `confined_path`, by the allowed roots."""
        return confined_path(path, self.roots)

    def inspect(self, name: str, path: str | Path) -> Inspection:
        """Check an adapter's files, all of one moment.

        Raises:
            AdapterPathError: the path, symbolic links followed, is in no allowed root.
            InvalidAdapterError: the files.
            AdapterChangingError: they changed while they were read, and again.
        """
        directory = self.confined(path)
        stamp = files_stamp(directory)
        for _ in range(MAX_READINGS):
            nbytes = _weights_bytes(directory)
            with self._budget.taken(nbytes):
                try:
                    inspection = self._inspect(name, directory, stamp)
                finally:
                    if nbytes >= LARGE_FILE_BYTES:
                        give_memory_back()
            stamp = files_stamp(directory)
            if stamp == inspection.stamp:
                return inspection
        raise AdapterChangingError(
            f"the files in {directory} changed while they were read; try again when they are there"
        )

    def inspect_all(
        self, folders: Sequence[tuple[str, str | Path]]
    ) -> Iterator[Inspection | SLoRAError]:
        """Of many names and paths, in their order; as many at once as there are cores.

        Reading and hashing let other threads run; the checks of each file's tensors do not.
        """
        if not folders:
            return
        started_at = time.monotonic()
        num_threads = len(os.sched_getaffinity(0))
        nbytes, read_s = 0, 0.0
        with ThreadPoolExecutor(num_threads) as pool:
            for result in pool.map(self._inspect_or_error, *zip(*folders, strict=True)):
                if isinstance(result, Inspection):
                    nbytes += result.record.nbytes
                    read_s += result.read_s
                yield result
        took_s = time.monotonic() - started_at
        logger.info(
            "checked %d adapters, %.2f GB, in %.2f s: reading and hashing are %.0f%% of %d threads",
            len(folders),
            nbytes / 1e9,
            took_s,
            100 * read_s / max(took_s * num_threads, 1e-9),
            num_threads,
        )

    def _inspect_or_error(self, name: str, path: str | Path) -> Inspection | SLoRAError:
        try:
            return self.inspect(name, path)
        except SLoRAError as error:
            # Whoever keeps it must not keep the frames that it passed, and the files read in them.
            error.__cause__ = error.__context__ = None
            return error.with_traceback(None)

    def _inspect(self, name: str, directory: Path, stamp: FilesStamp) -> Inspection:
        summary = inspect_peft_adapter(directory, self.geometry, self._rules)
        text = AdapterText()
        warnings: tuple[str, ...] = ()
        if self._base_text is not None:
            text, warnings = read_adapter_text(directory, self._base_text)
        record = AdapterRecord(
            name=name,
            adapter_id=summary.adapter_id,
            version=0,
            path=str(directory),
            max_rank=summary.max_rank,
            num_pages=summary.num_pages,
            nbytes=summary.nbytes,
            loaded_at=time.time(),
            warnings=(*summary.warnings, *warnings),
            text=text,
        )
        return Inspection(record, stamp, summary.read_s)


def _weights_bytes(directory: Path) -> int:
    try:
        return os.stat(directory / WEIGHTS_FILE).st_size
    except OSError:
        # Whoever reads it says what is wrong.
        return 0
