"""Files of packed adapters: whole or not seen, damage, the limit, stores that share a directory."""

import errno
import logging
import mmap
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from app.store import packed_files, packed_format
from app.store.packed_files import PackedFiles
from app.store.packed_format import DamagedFileError
from slora_core.adapters.page_layout import AdapterGeometry, pack_adapter
from tests.app.store.test_memory import GEOMETRY, PAGE, make_weights

PLENTY = 1 << 30
# A file of an adapter of one memory page has one more of header.
FILE = 2 * PAGE


def packed(seed: int = 0, num_pages: int = 1, geometry: AdapterGeometry = GEOMETRY):
    """(layout, pages as bytes) of an adapter."""
    layout, weights = make_weights(seed, num_pages)
    pages = pack_adapter(geometry, layout, weights)
    return layout, memoryview(pages.numpy().tobytes())


def write(files: PackedFiles, name: str, used_at: float = 1000, registered=None, **options) -> bool:
    everything = {name} if registered is None else registered
    return files.write(name, *packed(**options), used_at, everything)


def read(files: PackedFiles, name: str) -> bytes | None:
    """An adapter's pages, None where there are none that are whole."""
    try:
        with files.open(name) as file:
            if file is None:
                return None
            pages = bytearray(file.layout.num_pages * GEOMETRY.page_bytes)
            file.read_into(memoryview(pages))
            return bytes(pages)
    except DamagedFileError:
        return None


def path_of(files: PackedFiles, name: str) -> Path:
    [path] = files._space.root.glob(f"*/{name}.packed")
    return path


@pytest.fixture
def make(tmp_path):
    """`make(max_bytes)` is a store's files in one directory that all share."""
    made = []

    def make_files(max_bytes: int = PLENTY, geometry: AdapterGeometry = GEOMETRY) -> PackedFiles:
        files = PackedFiles(tmp_path / "packed", geometry, max_bytes)
        made.append(files)
        files.start()
        return files

    yield make_files
    for files in made:
        files.close()


def test_what_was_written_is_read_with_its_layout(make) -> None:
    files = make()
    layout, pages = packed(seed=3, num_pages=5)
    assert "a" not in files and read(files, "a") is None
    assert files.write("a", layout, pages, 1000, {"a"})
    assert "a" in files and read(files, "a") == pages
    with files.open("a") as file:
        assert torch.equal(file.layout.offsets, layout.offsets)
        assert torch.equal(file.layout.scaling, layout.scaling)
        assert file.layout.num_pages == layout.num_pages
        assert file.layout.max_rank == layout.max_rank
    assert (files.num_files, files.nbytes) == (1, 6 * PAGE)
    # Weights may be private.
    assert path_of(files, "a").stat().st_mode & 0o077 == 0
    files.remove("a")
    assert "a" not in files and (files.num_files, files.nbytes) == (0, 0)


def test_pages_begin_at_a_memory_page(make) -> None:
    files = make()
    write(files, "a", seed=1)
    data = path_of(files, "a").read_bytes()
    assert data[mmap.PAGESIZE :] == packed(1)[1]


def _cut(data: bytearray, at: int) -> bytes:
    return bytes(data[:at])


def _flip(data: bytearray, at: int) -> bytes:
    data[at] ^= 1
    return bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: _cut(data, 10),
        lambda data: _cut(data, 60),
        lambda data: _cut(data, PAGE),
        lambda data: _cut(data, len(data) - 1),
        # Of the magic, the length, the header's text, the pages' first and last byte.
        lambda data: _flip(data, 0),
        lambda data: _flip(data, 19),
        lambda data: _flip(data, 100),
        lambda data: _flip(data, PAGE),
        lambda data: _flip(data, len(data) - 1),
        # What a power failure may leave of a file that was renamed in time.
        lambda data: bytes(len(data)),
        lambda data: data[:PAGE] + bytes(len(data) - PAGE),
    ],
)
def test_a_damaged_file_is_deleted(make, damage) -> None:
    files = make()
    write(files, "a", num_pages=3)
    path = path_of(files, "a")
    path.write_bytes(damage(bytearray(path.read_bytes())))
    with pytest.raises(DamagedFileError), files.open("a") as file:
        file.read_into(memoryview(bytearray(3 * PAGE)))
    assert not path.exists() and files.num_files == 0
    assert write(files, "a") and read(files, "a") == packed()[1]


def test_a_file_of_another_adapter_or_geometry_is_damaged(make) -> None:
    files = make()
    write(files, "a")
    path = path_of(files, "a")
    path.rename(path.with_name("b.packed"))
    assert read(files, "b") is None and "b" not in files
    write(files, "a")
    other = make(geometry=replace(GEOMETRY, page_elems=2 * GEOMETRY.page_elems))
    assert "a" not in other
    other._directory.mkdir()
    path.rename(other._directory / path.name)
    with pytest.raises(DamagedFileError, match="in geometry"), other.open("a"):
        pass
    assert "a" not in other


def test_a_header_that_makes_no_sense_is_damage(make, monkeypatch) -> None:
    files = make()
    monkeypatch.setattr(packed_format.json, "dumps", lambda *_, **__: '{"adapter_id": 5}')
    write(files, "a")
    assert read(files, "a") is None and "a" not in files


def test_a_file_that_the_disk_does_not_give_stays(make, monkeypatch) -> None:
    files = make()
    write(files, "a")

    class Failing(packed_files.FileIO):
        def readinto(self, piece):
            raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(packed_files, "FileIO", Failing)
        with pytest.raises(OSError, match="Input/output"), files.open("a"):
            pass
    assert read(files, "a") == packed()[1]


_WRITER = """
    import os, sys, time
    from app.store import packed_files
    from tests.app.store.test_packed_files import GEOMETRY, PLENTY, write
    written = packed_files.write_all
    def write_half(fd, piece):
        written(fd, piece[: len(piece) // 2])
        print("half", flush=True)
        time.sleep(60)
    packed_files.write_all = write_half
    files = packed_files.PackedFiles(sys.argv[1], GEOMETRY, PLENTY)
    files.start()
    write(files, "a")
"""


def test_a_killed_writer_leaves_nothing_that_is_seen(make, tmp_path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_WRITER), str(tmp_path / "packed")],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    assert writer.stdout is not None and writer.stdout.readline() == b"half\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    [partial] = (tmp_path / "packed").glob("*/.partial-*")
    files = make()
    assert not partial.exists() and "a" not in files and files.num_files == 0
    assert write(files, "a") and read(files, "a") == packed()[1]


def test_the_least_recently_used_goes_and_what_is_not_registered_before_it(make) -> None:
    files = make(4 * FILE)
    registered = {"a", "b", "d", "new"}
    for used_at, name in enumerate("abcd"):
        assert write(files, name, 1000 + used_at, registered)
    files.used("a", 2000)
    assert files.has_room(PAGE, 1500, registered)
    assert write(files, "new", 1500, registered) and "c" not in files
    assert write(files, "e", 1600, registered | {"e"}) and "b" not in files
    assert {name for name in ["a", "d", "new", "e"] if name in files} == {"a", "d", "new", "e"}
    assert files.nbytes == 4 * FILE == make().nbytes


def test_what_was_used_longer_ago_than_all_that_is_there_is_not_written(make) -> None:
    files = make(2 * FILE)
    registered = {"a", "b", "c", "d"}
    write(files, "a", 1000, registered)
    write(files, "b", 1001, registered)
    assert not files.has_room(PAGE, 1000, registered)
    assert not write(files, "c", 1000, registered)
    assert "a" in files and "b" in files
    # Nor what no limit would hold, for which nothing is given up.
    assert not write(files, "d", 5000, registered, num_pages=4)
    assert "a" in files and "b" in files


def test_no_bytes_switch_it_off(make, tmp_path) -> None:
    write(make(), "a")
    files = make(0)
    assert not files.has_room(1, 5000, ()) and not write(files, "b")
    assert "a" not in files and read(files, "a") is None
    PackedFiles(tmp_path / "never", GEOMETRY, 0).start()
    assert not (tmp_path / "never").exists()


def test_two_stores_share_files_and_the_limit(make) -> None:
    first, second = make(4 * FILE), make(4 * FILE)
    for used_at, name in enumerate("ab"):
        assert write(first, name, 1000 + used_at)
    assert read(second, "a") == packed()[1]
    for used_at, name in enumerate("cd"):
        assert write(second, name, 2000 + used_at)
    # Neither knows what the other has registered: all files count alike.
    assert write(first, "e", 3000, {"b", "e"}) and "a" not in second and "b" in second
    assert first.nbytes == 4 * FILE
    # It is gone under the other one, which takes that as it is.
    assert read(second, "a") is None
    # The other may have registered it, too.
    first.remove("b")
    assert "b" in second
    second.close()
    first.remove("b")
    assert "b" not in first


def test_a_store_of_another_process_counts(make, tmp_path) -> None:
    files = make()
    write(files, "a")
    script = (
        "import sys; from app.store.packed_files import PackedFiles;"
        "from tests.app.store.test_memory import GEOMETRY;"
        "files = PackedFiles(sys.argv[1], GEOMETRY, 1 << 30); files.start();"
        "print('there', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "packed")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    assert other.stdout is not None and other.stdout.readline() == b"there\n"
    files.remove("a")
    assert "a" in files
    other.kill()
    other.communicate()
    files.remove("a")
    assert "a" not in files


def test_a_full_disk_is_told_once_and_tried_again_later(make, monkeypatch, caplog) -> None:
    files = make()
    write(files, "a")
    original = os.write

    def full(fd, piece):
        if len(piece) < PAGE // 2:
            return original(fd, piece)
        original(fd, piece[: PAGE // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(os, "write", full)
        assert not write(files, "b") and not write(files, "c")
        patch.setattr(packed_files, "RETRY_WRITE_S", 0)
        assert not write(files, "d")
    assert caplog.text.count("No space left on device") == 1
    assert read(files, "a") == packed()[1]
    # Not at once.
    assert not files.has_room(1, 1000, ()) and not write(files, "b")
    monkeypatch.setattr(packed_files, "RETRY_WRITE_S", 0)
    assert write(files, "b") and read(files, "b") == packed()[1]
    assert not list(files._space.root.glob("*/.partial-*"))


def test_a_disk_that_others_have_filled_gives_up_only_what_is_not_registered(
    make, monkeypatch, caplog
) -> None:
    files = make()
    write(files, "old", 1000)
    write(files, "kept", 900)
    status = os.statvfs("/")

    class Full:
        f_frsize, f_blocks, f_bavail = status.f_frsize, status.f_blocks, status.f_blocks // 20 + 1

    monkeypatch.setattr(os, "statvfs", lambda _: Full)
    assert write(files, "new", 5000, {"kept", "new"}) and "old" not in files
    with caplog.at_level(logging.WARNING):
        assert not write(files, "more", 6000, {"kept", "new", "more"}, num_pages=4)
    assert "over 95% full" in caplog.text and "kept" in files and "new" in files


def test_a_directory_that_cannot_be_made_costs_a_warning(tmp_path, caplog) -> None:
    (tmp_path / "file").write_text("")
    files = PackedFiles(tmp_path / "file" / "packed", GEOMETRY, PLENTY)
    with caplog.at_level(logging.WARNING):
        files.start()
        assert not write(files, "a") and read(files, "a") is None
    assert caplog.text.count("are not kept in") == 1


def test_an_emptied_directory_is_made_anew(make, tmp_path) -> None:
    files = make()
    write(files, "a")
    shutil.rmtree(tmp_path / "packed")
    assert "a" not in files and read(files, "a") is None
    assert write(files, "a") and read(files, "a") == packed()[1]
    # And it is seen there again.
    other = make()
    other.remove("a")
    assert "a" in files


class TwoStores(RuleBasedStateMachine):
    """Any sequence on two stores of one directory against a dictionary of what may be there."""

    LIMIT = 6
    names = st.sampled_from("abcdefgh")
    stores = st.sampled_from([0, 1])

    @initialize()
    def start(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.stores_open = [self._open(), self._open()]
        self.clock = 1000
        # What was written and may have been given up since: name to number of pages.
        self.written: dict[str, int] = {}
        self.registered: set[str] = set()

    def _open(self) -> PackedFiles:
        files = PackedFiles(self.directory.name, GEOMETRY, self.LIMIT * PAGE)
        files.start()
        return files

    @rule(name=names, store=stores, num_pages=st.integers(1, 4), age=st.integers(0, 5))
    def write(self, name: str, store: int, num_pages: int, age: int) -> None:
        files = self.stores_open[store]
        self.clock += 1
        before = {other: other in files for other in self.written}
        self.registered.add(name)
        has_room = files.has_room((num_pages + 1) * PAGE, self.clock - age, self.registered)
        was_there = name in files
        is_there = files.write(
            name, *packed(ord(name), num_pages), self.clock - age, self.registered
        )
        assert is_there == (was_there or has_room) == (name in files)
        if is_there and not was_there:
            self.written[name] = num_pages
        if not is_there:
            assert before == {other: other in files for other in before}

    @rule(name=names, store=stores)
    def read(self, name: str, store: int) -> None:
        pages = read(self.stores_open[store], name)
        if pages is not None:
            assert pages == packed(ord(name), self.written[name])[1]

    @rule(name=names, store=stores)
    def use(self, name: str, store: int) -> None:
        self.clock += 1
        self.stores_open[store].used(name, self.clock)

    @rule(name=names, store=stores)
    def unregister(self, name: str, store: int) -> None:
        self.registered.discard(name)
        was_there = name in self.stores_open[store]
        self.stores_open[store].remove(name)
        assert (name in self.stores_open[store]) == was_there, "the other store lives"

    @rule(name=names)
    def damage(self, name: str) -> None:
        for path in Path(self.directory.name).glob(f"*/{name}.packed"):
            path.write_bytes(path.read_bytes()[:-1])

    @rule(store=stores)
    def restart(self, store: int) -> None:
        self.stores_open[store].close()
        self.stores_open[store] = self._open()

    @rule()
    def vanish(self) -> None:
        for path in list(Path(self.directory.name).glob("*/*.packed"))[:1]:
            path.unlink()
        # As the keeper has it every few seconds.
        for files in self.stores_open:
            files.expect_changes()

    @invariant()
    def the_limit_holds(self) -> None:
        if hasattr(self, "directory"):
            sizes = [p.stat().st_size for p in Path(self.directory.name).glob("*/*.packed")]
            assert sum(sizes) <= self.LIMIT * PAGE
            assert not list(Path(self.directory.name).glob("*/.partial-*"))

    def teardown(self) -> None:
        if hasattr(self, "directory"):
            for files in self.stores_open:
                files.close()
            self.directory.cleanup()


class TestTwoStores(TwoStores.TestCase):
    settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
