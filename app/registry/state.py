"""What the adapter registry remembers of each name, and its JSON form.

Every entry says itself in which format and for which geometry it was written, so that each can be
written alone. It decides nothing: `table` owns the entries, a `StateStore` keeps them.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from slora_core.adapters.page_layout import AdapterGeometry
from slora_core.adapters.peft_config import CONFIG_FILE
from slora_core.adapters.peft_weights import WEIGHTS_FILE
from slora_core.text.adapter_text import AdapterText
from slora_core.tokenizer_files import TEXT_FILES

logger = logging.getLogger(__name__)

_FORMAT = 2
# One document with everything.
_OLD_FORMAT = 1

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


@dataclass(frozen=True)
class Entry:
    """One name: what it means, and what must outlive that."""

    # Of the last content that the name had.
    version: int
    # None: it was unloaded, or forgotten with the directory that it was scanned in.
    record: AdapterRecord | None = None
    # The record's files as they were when it was loaded.
    stamp: FilesStamp = None
    # The directory of adapters whose scan found the record; None: somebody loaded it.
    scanned_in: str | None = None
    # By hand: a scan must not bring it back.
    is_unloaded: bool = False


class StateStore(Protocol):
    """Where entries outlive the registry, each under its name and replaced whole."""

    def read(self) -> dict[str, bytes]:
        """Every entry by its name. Raises OSError where they cannot be read."""

    def write(self, entries: Mapping[str, bytes]) -> None:
        """Replace these. Raises OSError where not all could be; none is half-written."""


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


def encode_entry(entry: Entry, geometry: str) -> bytes:
    """`geometry` is a `geometry_key`."""
    content = {
        "format": _FORMAT,
        "geometry": geometry,
        "version": entry.version,
        "record": None if entry.record is None else asdict(entry.record),
        "stamp": entry.stamp,
        "scanned_in": entry.scanned_in,
        "is_unloaded": entry.is_unloaded,
    }
    return json.dumps(content).encode()


def decode_entry(name: str, data: bytes, geometry: str) -> Entry | None:
    """The entry that was encoded, or None where it is damaged.

    Sizes depend on the geometry: where it was another one, the stamp is left out, so that the
    adapter counts as changed.
    """
    try:
        content = json.loads(data)
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']}, not {_FORMAT}")
        fields, stamp = content["record"], content["stamp"]
        is_same = content["geometry"] == geometry and stamp is not None
        return Entry(
            version=int(content["version"]),
            record=None if fields is None else AdapterRecord.from_fields(fields),
            stamp=tuple(stamp) if is_same else None,
            scanned_in=content.get("scanned_in"),
            # Once every name without a record had been unloaded.
            is_unloaded=bool(content.get("is_unloaded", fields is None)),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("what is remembered of adapter %s is damaged and ignored: %r", name, error)
        return None


def entries_of_old_state(data: bytes) -> dict[str, bytes]:
    """The entries of a state that was written as one document, as files had it once.

    Raises:
        ValueError: it is damaged.
    """
    try:
        content = json.loads(data)
        if content["format"] != _OLD_FORMAT:
            raise ValueError(f"format {content['format']}, not {_OLD_FORMAT}")
        records = {fields["name"]: fields for fields in content["records"]}
        names = dict.fromkeys([*records, *content["versions"], *content["unloaded"]])
        return {
            name: encode_entry(
                Entry(
                    version=int(content["versions"].get(name, 0)),
                    record=AdapterRecord.from_fields(records[name]) if name in records else None,
                    stamp=content["stamps"].get(name),
                    is_unloaded=name not in records,
                ),
                content["geometry"],
            )
            for name in names
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(repr(error)) from error
