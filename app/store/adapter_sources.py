"""Where a node's store gets an adapter's bytes: its packed file, else the adapter's own files.

Owns the order of the two and the check that files are still those that were registered. It decides
neither when (`packer`, `keeper`) nor what stays (`memory`, `packed_space`), and blocks: call it in
a thread.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping

from app.registry.state import AdapterRecord, FilesStamp, files_stamp
from app.store.memory import HostStore
from app.store.packed_files import PackedFiles
from app.store.packed_format import DamagedFileError
from slora_core.adapters.adapter_rules import AdapterRules, CheckedTensors
from slora_core.adapters.page_layout import AdapterLayout, LoraWeights, ModuleKey
from slora_core.adapters.peft_weights import read_peft_adapter
from slora_core.errors import AdapterUnavailableError, InvalidAdapterError

logger = logging.getLogger(__name__)

# Seconds between two lines of the log on one adapter that nothing has the bytes of.
LOG_EVERY_S = 60.0

# The registry has checked the very same bytes, more strictly.
_CHECKED = AdapterRules("warn", base_tensors=CheckedTensors())


class AdapterSources:
    """Brings adapters into a host store."""

    def __init__(self, host: HostStore, files: PackedFiles) -> None:
        self._host = host
        self._files = files
        # Files that hold another content than the adapter's: not read again until they change.
        self._other_contents: dict[str, FilesStamp] = {}
        self._lock = threading.Lock()
        self.num_disk_reads = 0

    def from_packed_file(self, adapter_id: str, evict: bool) -> bool:
        """Read an adapter's packed file into the slab; false where there is none that is whole.

        Raises:
            StoreFullError: as `HostStore.fill`.
        """
        try:
            with self._files.open(adapter_id) as file:
                if file is None:
                    return False
                is_filled = self._host.fill(adapter_id, file.layout, file.read_into, evict)
        except DamagedFileError as error:
            logger.warning("the packed file of adapter %s was damaged: %s", adapter_id, error)
            return False
        except OSError as error:
            # It stays: what a disk does not give now it may give later.
            logger.warning("the packed file of adapter %s is not read: %s", adapter_id, error)
            return False
        with self._lock:
            self.num_disk_reads += is_filled
        return True

    def read_files(
        self, record: AdapterRecord
    ) -> tuple[AdapterLayout, Mapping[ModuleKey, LoraWeights]]:
        """Layout and weights by the adapter's own files.

        Raises:
            AdapterUnavailableError: they are gone, or not what they were when it was registered.
        """
        stamp = files_stamp(record.path)
        if stamp is None or self._other_contents.get(record.adapter_id) != stamp:
            try:
                summary, weights = read_peft_adapter(record.path, self._host.geometry, _CHECKED)
            except InvalidAdapterError as error:
                raise _unavailable(record, f"cannot be used any more ({error})") from error
            if summary.adapter_id == record.adapter_id:
                return summary.layout, weights
            self._other_contents[record.adapter_id] = stamp
        raise _unavailable(record, f"have changed since version {record.version} was loaded")

    def forget(self, adapter_id: str) -> None:
        """The adapter is registered no more."""
        self._other_contents.pop(adapter_id, None)


class UnavailableLog:
    """Tells operators which registered adapters nothing has the bytes of, not at every request."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told_at: dict[str, float] = {}

    def tell(self, record: AdapterRecord, error: AdapterUnavailableError) -> None:
        now = self._clock()
        self._told_at = {key: at for key, at in self._told_at.items() if now - at < LOG_EVERY_S}
        if record.adapter_id not in self._told_at:
            self._told_at[record.adapter_id] = now
            logger.error("adapter %s is registered and cannot be served: %s", record.name, error)


def _unavailable(record: AdapterRecord, what: str) -> AdapterUnavailableError:
    return AdapterUnavailableError(
        f"the files of adapter {record.name!r} in {record.path} {what}, and this node has no "
        "packed copy of them; trying again helps once they are back, or load the adapter again "
        "in place"
    )
