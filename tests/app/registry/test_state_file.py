"""The file of the registry's state: whole at any moment, and what becomes of other files."""

import json
import signal
import sqlite3
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from app.registry.state import Entry, decode_entry, encode_entry
from app.registry.state_file import StateFile
from tests.app.fakes import make_record

GEOMETRY = "0123456789ab"

WRITER = """
import sys
from pathlib import Path
from app.registry.state_file import StateFile
file = StateFile(Path(sys.argv[1]))
for number in range(100_000):
    file.write({f"a{number % 50}": str(number).encode() * 200, "last": str(number).encode()})
    print(number, flush=True)
"""


class EndedError(Exception):
    """Of the process, in the middle of a write."""


def interrupt_a_write(path: Path) -> None:
    """Leaves what is on the disk when a process ends while it writes: half of it, and a journal."""
    files, contents = (path, journal(path)), []

    class Entries(dict):
        def items(self):
            # More than SQLite keeps in memory, so that a part is in the file by then.
            for number in range(200):
                yield f"a{number}", b"new" * 10_000
            contents.extend(file.read_bytes() for file in files)
            raise EndedError

    with pytest.raises(EndedError):
        StateFile(path).write(Entries())
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)


def journal(path: Path) -> Path:
    return path.with_name(f"{path.name}-journal")


@pytest.fixture
def file(tmp_path: Path) -> StateFile:
    return StateFile(tmp_path / "s" / "state")


def test_entries_are_replaced_one_by_one(file) -> None:
    assert file.read() == {}
    file.write({"a": b"1", "b/é": b"\x00\xff"})
    file.write({"a": b"2"})
    assert StateFile(file.path).read() == {"a": b"2", "b/é": b"\x00\xff"}


def test_a_writer_that_is_killed_at_any_moment_loses_nothing_it_told_of(file) -> None:
    last = -1
    for num_writes in (7, 40):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(file.path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(num_writes):
            last = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        entries = file.read()
        # It may have got a bit further than what was read.
        number = int(entries.pop("last"))
        assert number >= last
        written = {f"a{n % 50}": str(n).encode() * 200 for n in range(number + 1)}
        assert written.items() <= entries.items()
        for name, data in entries.items():
            assert data == data[: len(data) // 200] * 200, f"{name} is half of one"


def test_a_file_that_is_half_written_is_as_it_was_before(file) -> None:
    before = {f"a{number}": b"old" * 10_000 for number in range(300)}
    file.write(before)
    data = file.path.read_bytes()
    interrupt_a_write(file.path)
    assert file.path.read_bytes() != data and journal(file.path).stat().st_size > 0
    assert file.read() == before
    assert not journal(file.path).exists()
    file.write({"a7": b"newer"})
    assert StateFile(file.path).read() == {**before, "a7": b"newer"}


def test_what_a_damaged_file_was_half_written_with_never_comes_back(file) -> None:
    file.write({f"a{number}": b"old" * 10_000 for number in range(300)})
    interrupt_a_write(file.path)
    file.path.write_text("{")
    assert file.read() == {}
    file.write({"b": b"1"})
    assert file.read() == {"b": b"1"}
    assert file.path.with_name("state.damaged").read_text() == "{"


def test_every_change_is_on_the_disk_when_it_is_told_of(file, monkeypatch) -> None:
    """A machine may end too: SQLite waits for the disk where it is asked to."""
    statements = []
    connect = sqlite3.connect

    def connect_traced(*args, **options):
        database = connect(*args, **options)
        database.set_trace_callback(statements.append)
        return database

    monkeypatch.setattr("app.registry.state_file.sqlite3.connect", connect_traced)
    file.write({"a": b"1"})
    # 2 is FULL, and `delete` the journal that undoes what is half-written.
    assert "PRAGMA synchronous = FULL" in statements[: statements.index("COMMIT")]
    with connect(file.path) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_a_transaction_that_fails_leaves_what_was_there(file) -> None:
    file.write({"a": b"1"})
    with pytest.raises(OSError, match="the registry's state in"):
        file.write({"a": b"2", "b": None})
    assert file.read() == {"a": b"1"}


def test_a_file_that_cannot_be_used_is_an_error(tmp_path) -> None:
    (tmp_path / "directory").mkdir()
    with pytest.raises(OSError, match="directory"):
        StateFile(tmp_path / "directory").read()


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": 99}', '{"format": 1}', "null", "x" * 99]
)
def test_a_file_that_is_damaged_is_put_aside(file, content: str, caplog) -> None:
    file.write({"a": b"1"})
    file.path.write_text(content)
    assert file.read() == {}
    assert "is damaged and put aside" in caplog.text
    assert file.path.with_name("state.damaged").read_text() == content
    file.write({"b": b"2"})
    assert file.read() == {"b": b"2"}


def test_a_database_with_damaged_pages_is_put_aside(file, caplog) -> None:
    file.write({f"a{number}": bytes(1000) for number in range(50)})
    data = bytearray(file.path.read_bytes())
    data[4096:] = b"\x55" * (len(data) - 4096)
    file.path.write_bytes(data)
    assert file.read() == {}
    assert "put aside" in caplog.text


def old_document() -> tuple[dict, dict[str, Entry]]:
    """A state as one document, and what its entries mean."""
    there, away = make_record("there", version=3), make_record("away")
    document = {
        "format": 1,
        "geometry": GEOMETRY,
        "revision": 17,
        "records": [asdict(there), asdict(away)],
        "stamps": {"there": [1, 2, 3], "away": None},
        "versions": {"there": 3, "away": 1, "unloaded": 2},
        "unloaded": ["unloaded"],
    }
    entries = {
        "there": Entry(3, there, (1, 2, 3)),
        "away": Entry(1, away, None),
        "unloaded": Entry(2, is_unloaded=True),
    }
    return document, entries


def test_a_document_of_the_old_format_is_converted_once(file, caplog) -> None:
    document, expected = old_document()
    file.path.parent.mkdir()
    file.path.write_text(json.dumps(document))
    for _ in range(2):
        entries = file.read()
        decoded = {name: decode_entry(name, data, GEOMETRY) for name, data in entries.items()}
        assert decoded == expected
    with sqlite3.connect(file.path) as database:
        assert database.execute("SELECT count(*) FROM entries").fetchone() == (3,)


def test_a_conversion_that_is_interrupted_is_done_again(file, monkeypatch) -> None:
    document, expected = old_document()
    written = json.dumps(document)
    file.path.parent.mkdir()
    file.path.write_text(written)

    def ended(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("app.registry.state_file.os.replace", ended)
        with pytest.raises(KeyboardInterrupt):
            file.read()
    assert file.path.read_text() == written
    # One of another time may have left what is not in this document, half-written too.
    left = StateFile(file.path.with_name("state.new"))
    left.write({"unloaded long ago": b"1"})
    interrupt_a_write(left.path)
    assert file.read().keys() == expected.keys()
    assert sorted(path.name for path in file.path.parent.iterdir()) == ["state"]


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'{"format": 1}', b'{"format": 2}'])
def test_a_damaged_entry_is_ignored(data: bytes, caplog) -> None:
    assert decode_entry("mine", data, GEOMETRY) is None
    assert "of adapter mine is damaged" in caplog.text


def test_an_entry_of_another_geometry_has_no_stamp() -> None:
    entry = Entry(2, make_record("a", version=2), (1, 2, 3))
    assert decode_entry("a", encode_entry(entry, GEOMETRY), GEOMETRY) == entry
    assert decode_entry("a", encode_entry(entry, "another"), GEOMETRY) == Entry(2, entry.record)
