"""Registrations: versions, refusals, confinement to the roots, scans."""

import logging
import os
import shutil
import threading

import pytest

from app.registry.inspector import AdapterInspector
from app.registry.pools import FORGET_AFTER_S, LivingPools
from slora_core.adapters.peft_weights import inspect_peft_adapter
from slora_core.errors import (
    AdapterChangingError,
    AdapterExistsError,
    AdapterNameError,
    AdapterNotFoundError,
    AdapterPathError,
    AdapterTooLargeError,
    InvalidAdapterError,
)
from tests.factories import make_random_adapter


def test_load_describes_the_adapter(make, add, geometry) -> None:
    path = add("one", rank=5)
    record = make().load("one", path)
    summary = inspect_peft_adapter(path, geometry)
    assert (record.name, record.version, record.path) == ("one", 1, str(path))
    assert (record.adapter_id, record.max_rank) == (summary.adapter_id, 5)
    assert (record.num_pages, record.nbytes) == (summary.num_pages, summary.nbytes)


def test_every_change_raises_the_revision(make, add) -> None:
    registry = make()
    positions = [registry.position]
    registry.load("a", add("a"))
    positions.append(registry.position)
    registry.load("a", add("a", seed=2), replace=True)
    positions.append(registry.position)
    registry.unload("a")
    positions.append(registry.changes_since().position)
    assert positions == sorted(set(positions))
    assert registry.changes_since().records == {}
    with pytest.raises(AdapterNotFoundError):
        registry.unload("a")
    assert registry.position == positions[-1]


def test_the_smallest_living_pool_counts_and_nothing_is_forgotten(make, add) -> None:
    now = 100.0
    registry = make(pools=LivingPools(None, clock=lambda: now))
    small, large = (registry.load(f"rank-{r}", add(f"rank-{r}", rank=r)) for r in (4, 64))
    assert registry.changes_since().num_pool_pages is None
    registry.report_pool("first", large.num_pages + 1)
    position = registry.position
    # Of two engines the smaller one counts; a larger one changes nothing.
    registry.report_pool("second", large.num_pages + 9)
    assert registry.position == position
    registry.report_pool("third", small.num_pages + 1)
    snapshot = registry.changes_since()
    assert snapshot.num_pool_pages == small.num_pages + 1 and snapshot.position > position
    assert set(snapshot.records) == {"rank-4", "rank-64"}
    with pytest.raises(AdapterTooLargeError):
        registry.load("again", large.path)
    # The small one is gone; the others tell on.
    now += FORGET_AFTER_S
    registry.report_pool("first", large.num_pages + 1)
    registry.look_again()
    assert registry.changes_since().num_pool_pages == large.num_pages + 1
    assert registry.load("again", large.path).num_pages == large.num_pages


def test_versions_count_contents_of_a_name(make, add) -> None:
    registry = make()
    first = registry.load("a", add("a"))
    with pytest.raises(AdapterExistsError, match="version 1 .* replace it or unload"):
        registry.load("a", add("other", seed=9))
    assert registry.load("a", first.path, replace=True).version == 1
    second = registry.load("a", add("a", seed=2), replace=True)
    assert second.version == 2 and second.adapter_id != first.adapter_id
    registry.unload("a")
    assert registry.load("a", second.path).version == 3
    assert registry.load("b", second.path).version == 1


def test_a_failed_replacement_keeps_the_old_version(make, add) -> None:
    registry = make()
    old = registry.load("a", add("a"))
    bad = add("bad")
    file = bad / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    position = registry.position
    with pytest.raises(InvalidAdapterError):
        registry.load("a", bad, replace=True)
    assert registry.records() == {"a": old} and registry.position == position


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "a b", "a\n", "é", "a" * 129, "base", "a\0"])
def test_names_that_are_refused(make, add, name: str) -> None:
    with pytest.raises(AdapterNameError, match="adapter name"):
        make(reserved_names=["base"]).load(name, add("x"))


@pytest.mark.parametrize("name", ["a", "Team-1/date_iso:v2", "x@y+z", "a" * 128])
def test_names_that_are_taken(make, add, name: str) -> None:
    assert make().load(name, add("x")).name == name


def test_paths_are_confined_to_the_roots(make, add, root, tmp_path, model_dir) -> None:
    registry = make()
    outside = make_random_adapter(tmp_path / "outside", model_dir)
    (root / "link").symlink_to(outside)
    inside = add("inside")
    (tmp_path / "link_in").symlink_to(inside)
    half = add("half")
    (half / "adapter_config.json").unlink()
    (half / "adapter_config.json").symlink_to(outside / "adapter_config.json")
    bad = [outside, "../outside", root / ".." / "outside", root / "link", "link", half]
    bad += ["/etc", "/nonexistent", "a\0b", "/", "/proc/self/root" + str(outside), "x" * 5000]
    for path in bad:
        with pytest.raises(AdapterPathError):
            registry.load("a", path)
    assert registry.load("a", tmp_path / "link_in").path == str(inside)
    assert registry.load("b", "inside").path == str(inside)
    with pytest.raises(InvalidAdapterError, match="not a directory"):
        registry.load("c", "nowhere")
    with pytest.raises(AdapterPathError, match="none are configured"):
        make(allowed_roots=[], store=None).load("a", inside)


def test_an_adapter_too_large_for_the_pool(make, add, geometry) -> None:
    path = add("a", rank=32)
    pages = make().load("a", path).num_pages
    registry = make(num_pool_pages=pages + 1)
    registry.load("b", path)
    assert set(registry.records()) == {"a", "b"}
    # Restarted with a smaller pool, it forgets none: there may be a larger one again.
    registry = make(num_pool_pages=pages)
    assert set(registry.records()) == {"a", "b"}
    mib = geometry.page_bytes / 2**20
    with pytest.raises(AdapterTooLargeError) as error:
        registry.load("c", path)
    assert str(error.value) == (
        f"adapter 'c' takes {pages} pages ({pages * mib:.2f} MiB) and a request at least one "
        f"more; the pool has {pages} pages ({pages * mib:.2f} MiB)"
    )


def test_unload_of_an_unknown_name_lists_a_few(make, add) -> None:
    registry = make()
    with pytest.raises(AdapterNotFoundError, match="'x'; none are loaded"):
        registry.unload("x")
    path = add("a")
    for i in range(10):
        registry.load(f"n{i}", path)
    with pytest.raises(AdapterNotFoundError, match=r"n0, .*, n7 and 2 more$"):
        registry.unload("x")


def test_scan_loads_the_good_and_reports_the_bad(make, add, root, tmp_path, model_dir) -> None:
    add("good")
    add("also_good", seed=2)
    add("dora", use_dora=True)
    add("bad name")
    add(".hidden")
    (root / "empty").mkdir()
    (root / "file").write_text("no adapter")
    (root / "away").symlink_to(make_random_adapter(tmp_path / "outside", model_dir))
    registry = make()
    failures = dict(registry.scan(root))
    assert set(registry.records()) == {"good", "also_good"}
    assert set(failures) == {"dora", "bad name", "empty", "away"}
    assert "use_dora" in str(failures["dora"])
    assert isinstance(failures["away"], AdapterPathError)
    with pytest.raises(AdapterPathError, match="cannot list"):
        registry.scan(root / "nowhere")


def test_a_folder_whose_name_is_no_text_is_skipped_in_words(make, add, root, caplog) -> None:
    (root / os.fsdecode(b"caf\xe9")).mkdir()
    add("good")
    with caplog.at_level("WARNING"):
        assert len(make().scan(root)) == 1
    # As a log of UTF-8 takes it.
    assert r"adapter caf\udce9 in " in caplog.text.encode().decode()


def test_a_second_scan_takes_what_is_new(make, add, root, tmp_path, model_dir) -> None:
    registry = make()
    add("same")
    add("changes")
    add("unloaded")
    add("moved")
    registry.scan(root)
    before = registry.records()
    registry.unload("unloaded")
    elsewhere = add(".deep/moved", seed=9)
    registry.load("moved", elsewhere, replace=True)
    shutil.rmtree(root / "changes")
    add("changes", seed=5)
    add("new")
    registry.scan(root)
    after = registry.records()
    assert set(after) == {"same", "changes", "moved", "new"}
    assert after["same"] == before["same"]
    assert after["changes"].version == 2
    assert after["moved"].path == str(elsewhere)


def test_the_same_content_again_is_no_error(make, add, root) -> None:
    registry = make()
    first = registry.load("a", add("a"))
    assert registry.load("a", root / "a").version == first.version
    shutil.copytree(root / "a", root / "copy")
    assert registry.load("a", root / "copy").path == str(root / "copy")
    with pytest.raises(AdapterExistsError, match="with another content; ask to replace it"):
        registry.load("a", add("b", seed=4))


def test_files_that_change_while_they_are_read_are_read_again(make, add, monkeypatch) -> None:
    from app.registry import inspector

    registry = make()
    path = add("a")
    stamps = iter([(1,), (2,), (2,), (1,), (2,), (3,)])
    monkeypatch.setattr(inspector, "files_stamp", lambda directory: next(stamps))
    assert registry.load("a", path).name == "a"
    with pytest.raises(AdapterChangingError, match="changed while they were read; try again"):
        registry.load("b", path)


def test_a_scan_checks_folders_side_by_side_and_says_what_it_took(
    make, add, root, caplog, monkeypatch
) -> None:
    for index in range(6):
        add(f"a{index}", seed=index)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(3))
    together = threading.Barrier(3, timeout=30)
    inspect = AdapterInspector._inspect

    def inspect_together(self, *args):
        together.wait()
        return inspect(self, *args)

    monkeypatch.setattr(AdapterInspector, "_inspect", inspect_together)
    registry = make()
    with caplog.at_level(logging.INFO):
        registry.scan(root)
    assert list(registry.records()) == [f"a{index}" for index in range(6)]
    assert "checked 6 adapters, 0.00 GB, in" in caplog.text
    assert "reading and hashing are" in caplog.text and "of 3 threads" in caplog.text
