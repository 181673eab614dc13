"""What a registry must know after any operations, and the folders that it reads: plain data.

`test_registry_machine` plays the same operations to both and compares.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from app.registry.inspector import AdapterInspector, Inspection
from app.registry.pools import FORGET_AFTER_S
from app.registry.registrations import Registrations
from app.registry.state import AdapterRecord
from slora_core.errors import InvalidAdapterError
from slora_core.text.adapter_text import AdapterText
from tests.app.fakes import make_record
from tests.factories import uniform_geometry

GEOMETRY = uniform_geometry(1, 64, {"q_proj": (64, 64)})


class Disk:
    """Folders, each with the pages of its adapter, None where that is none, and a stamp."""

    def __init__(self, contents: Mapping[str, int | None]) -> None:
        self._folders = {path: (content, (0,)) for path, content in contents.items()}
        # Those that are somewhere else for a while.
        self._away: set[str] = set()

    def write(self, path: str, content: int | None) -> None:
        _, (number,) = self._folders[path]
        self._folders[path] = content, (number + 1,)
        self._away.discard(path)

    def move_away_or_back(self, path: str) -> None:
        """What comes back is as it was, its times included."""
        self._away ^= {path}

    def content(self, path: str) -> int | None:
        return None if path in self._away else self._folders[path][0]

    def stamp(self, path: str) -> tuple[int, ...] | None:
        return None if path in self._away else self._folders[path][1]


class DiskInspector(AdapterInspector):
    def __init__(self, disk: Disk) -> None:
        super().__init__(GEOMETRY, ["/"])
        self._disk = disk

    def inspect(self, name, path):
        content, stamp = self._disk.content(str(path)), self._disk.stamp(str(path))
        if content is None:
            raise InvalidAdapterError(f"{path} is no adapter")
        return Inspection(record_of(name, content, str(path), stamp), stamp, 0.0)


def record_of(
    name: str, content: int, path: str, stamp: tuple[int, ...], version: int = 0
) -> AdapterRecord:
    """With something of its own in every field that a restart could lose."""
    return make_record(
        name,
        version,
        adapter_id=f"id-{content}",
        path=path,
        num_pages=content,
        loaded_at=float(stamp[0]),
        warnings=(f"of {path}",),
        text=AdapterText((content, 7), f"template {content}"),
    )


@dataclass
class Name:
    version: int = 0
    # Pages of what it means; None: it was unloaded.
    content: int | None = None
    path: str = ""
    # Of the files when they were last found to be an adapter.
    stamp: tuple[int, ...] = ()
    is_available: bool = True


@dataclass
class Model:
    names: dict[str, Name] = field(default_factory=dict)
    # As a restart would find them.
    written: dict[str, Name] = field(default_factory=dict)
    pools: dict[str, tuple[int, float]] = field(default_factory=dict)
    num_pool_pages: int | None = None
    # Numbers of what is asked and not done, and the last that took effect, by name.
    asked: list[tuple[str, int]] = field(default_factory=list)
    done: dict[str, int] = field(default_factory=dict)

    def find(self, name: str) -> Name:
        return self.names.get(name, Name())

    def learn(self, name: str, disk: Disk, path: str) -> None:
        """The files at a path were looked at for a name."""
        known = self.names.setdefault(name, Name())
        content, stamp = disk.content(path), disk.stamp(path)
        known.is_available = content is not None
        if content is not None and stamp is not None:
            known.version += known.content != content
            known.content, known.path, known.stamp = content, path, stamp

    def fits(self, content: int) -> bool:
        return self.num_pool_pages is None or content < self.num_pool_pages

    def count_pools(self, now: float) -> None:
        living = [pages for pages, at in self.pools.values() if now - at < FORGET_AFTER_S]
        self.num_pool_pages = min(living, default=None)

    def write(self) -> None:
        self.written = copy.deepcopy(self.names)

    def restart(self, disk: Disk) -> None:
        """The process has ended, at whatever moment, and another one checks what it finds."""
        self.names = copy.deepcopy(self.written)
        self.pools, self.num_pool_pages = {}, None
        self.asked, self.done = [], {}
        registered = [(n, known) for n, known in self.names.items() if known.content is not None]
        for name, known in registered:
            if not known.is_available or known.stamp != disk.stamp(known.path):
                self.learn(name, disk, known.path)

    def records(self) -> dict[str, AdapterRecord]:
        """Without reasons why files cannot be used."""
        return {
            name: record_of(name, known.content, known.path, known.stamp, known.version)
            for name, known in self.names.items()
            if known.content is not None
        }

    def unavailable(self) -> set[str]:
        names = self.names.items()
        return {n for n, known in names if known.content is not None and not known.is_available}


class Follower:
    """A copy, and what somebody knows who only hears what is gone and what is new."""

    def __init__(self) -> None:
        self.copy = Registrations()
        self.adapters: dict[str, AdapterRecord] = {}

    def hear(self, registry) -> None:
        """Ask for what has changed since it asked last."""
        taken = self.copy.take(registry.changes_since(self.copy.position))
        assert taken is not None, "it follows on what was asked for"
        for adapter_id in taken.gone:
            del self.adapters[adapter_id]
        self.adapters.update({record.adapter_id: record for record in taken.news})
        assert self.copy.records == registry.records()
        assert self.copy.position == registry.position
        assert self.adapters == self.copy.adapters()


def without_reasons(records: Mapping[str, AdapterRecord]) -> dict[str, AdapterRecord]:
    return {name: replace(record, unavailable=None) for name, record in records.items()}
