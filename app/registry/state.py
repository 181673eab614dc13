"""What the adapter registry remembers, its JSON form, and the file that may hold it.

It decides nothing: `registry` owns the state and says when it is written.
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

from slora_core.adapters.page_layout import AdapterGeometry
from slora_core.adapters.peft_config import CONFIG_FILE
from slora_core.adapters.peft_weights import WEIGHTS_FILE
from slora_core.text.adapter_text import AdapterText
from slora_core.tokenizer_files import TEXT_FILES

logger = logging.getLogger(__name__)

_FORMAT = 1

# Size, time and inode of an adapter's files; None where one of the two that it must have cannot be
# read.
FilesStamp = tuple[int, ...] | None


@dataclass(frozen=True)
class AdapterRecord:
    """One registered adapter: a name that points at one version of its content."""

    name: str
    # Content hash of its files.
    adapter_id: str
    # Counts the contents that this name has had, from 1.
    version: int
    # Real path of its directory.
    path: str
    max_rank: int
    num_pages: int
    # In page order.
    nbytes: int
    # Seconds since the epoch.
    loaded_at: float
    # What whoever loads or uses it should know; it is served all the same.
    warnings: tuple[str, ...] = ()
    # What its folder says of text beside the base model's files.
    text: AdapterText = AdapterText()
    # Why its files cannot be used at the moment; it is served from packed copies where there are.
    unavailable: str | None = None

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """The record that `asdict` made these fields of, JSON in between."""
        text = fields.get("text", {})
        ends = tuple(text.get("eos_token_ids", ()))
        return cls(
            **{
                **fields,
                "warnings": tuple(fields.get("warnings", ())),
                "text": AdapterText(**{**text, "eos_token_ids": ends}),
            }
        )


@dataclass
class RegistryState:
    """Registrations by name, and what must outlive them."""

    revision: int
    records: dict[str, AdapterRecord] = field(default_factory=dict)
    # The files of each record as they were when it was loaded.
    stamps: dict[str, FilesStamp] = field(default_factory=dict)
    # Last version of every name ever loaded.
    versions: dict[str, int] = field(default_factory=dict)
    # Names that were unloaded by hand, which a scan must not bring back.
    unloaded: set[str] = field(default_factory=set)


class StateStore(Protocol):
    """Where a registry's state outlives the registry: one document, replaced whole."""

    def read(self) -> bytes | None:
        """What was written last, None where nothing was."""

    def write(self, data: bytes) -> None:
        """Raises OSError where it cannot be written; what was there stays."""


@dataclass(frozen=True)
class StateFile:
    """A file as `StateStore`."""

    path: Path

    def read(self) -> bytes | None:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None

    def write(self, data: bytes) -> None:
        """Replace the file at once, so that a reader or a crash never sees half of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
            os.replace(temporary, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def geometry_key(geometry: AdapterGeometry) -> str:
    """Short name of a geometry, equal for equal ones."""
    return hashlib.sha256(repr(geometry).encode()).hexdigest()[:12]


def files_stamp(directory: str | Path) -> FilesStamp:
    """A cheap sign of whether an adapter's files have changed."""
    stamp: list[int] = []
    for name in (CONFIG_FILE, WEIGHTS_FILE, *TEXT_FILES):
        try:
            status = os.stat(Path(directory) / name)
        except OSError:
            if name in TEXT_FILES:
                continue
            return None
        stamp += [status.st_size, status.st_mtime_ns, status.st_ino]
    return tuple(stamp)


def encode_state(state: RegistryState, geometry: AdapterGeometry) -> bytes:
    content = {
        "format": _FORMAT,
        "geometry": geometry_key(geometry),
        "revision": state.revision,
        "records": [asdict(record) for record in state.records.values()],
        "stamps": state.stamps,
        "versions": state.versions,
        "unloaded": sorted(state.unloaded),
    }
    return json.dumps(content, indent=1).encode()


def decode_state(data: bytes, geometry: AdapterGeometry) -> RegistryState | None:
    """The state that was encoded, or None where it is damaged.

    Sizes depend on the geometry: where it was another one, the stamps are left out, so that
    every adapter counts as changed.
    """
    try:
        content = json.loads(data)
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']}, not {_FORMAT}")
        records = [AdapterRecord.from_fields(record) for record in content["records"]]
        same = content["geometry"] == geometry_key(geometry)
        return RegistryState(
            revision=int(content["revision"]),
            records={record.name: record for record in records},
            stamps={k: tuple(v) for k, v in content["stamps"].items() if same and v is not None},
            versions={name: int(version) for name, version in content["versions"].items()},
            unloaded=set(content["unloaded"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("the registry's state is damaged and ignored: %r", error)
        return None
