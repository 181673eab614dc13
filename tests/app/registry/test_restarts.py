"""What survives a restart, and files that are away for a while."""

import errno
import shutil
from dataclasses import replace

from app.registry.retries import MAX_PAUSE_S, Retries
from slora_core.adapters import peft_weights
from tests.factories import make_geometry, make_model


def test_registrations_survive_the_registry(make, add, root) -> None:
    registry = make()
    add("scanned")
    add("unloaded")
    registry.scan(root)
    registry.load("live", add(".deep/live", seed=1))
    registry.load("live", add(".deep/live2", seed=2), replace=True)
    registry.unload("unloaded")
    position, records = registry.position, registry.records()
    again = make()
    assert again.records() == records and again.position.epoch != position.epoch
    assert again.scan(root) == [] and again.records() == records
    assert again.load("unloaded", root / "unloaded").version == 2


def test_a_restart_forgets_nothing_and_checks_what_changed(make, add, root, caplog) -> None:
    registry = make()
    for name in ("same", "gone", "changed", "broken", "barred"):
        registry.load(name, add(name))
    records = registry.records()
    shutil.rmtree(root / "gone")
    add("changed", seed=8)
    (root / "broken" / "adapter_config.json").write_text("{}")
    shutil.rmtree(root / "barred")
    (root / "barred").symlink_to("/etc")
    again = make()
    assert again.records()["same"] == records["same"]
    assert again.records()["changed"].version == 2
    reasons = {"gone": "not a directory", "broken": "peft_type", "barred": "outside the allowed"}
    for name, reason in reasons.items():
        record = again.records()[name]
        assert reason in record.unavailable
        assert replace(record, unavailable=None) == records[name]
    assert {r.args[0] for r in caplog.records if r.levelname == "WARNING"} == set(reasons)
    # What it was is known over further restarts.
    assert make().records() == again.records()


def test_a_restart_with_other_roots_serves_no_files_outside_of_them(make, add, root) -> None:
    """The files are as they were; whoever narrows the roots means those too."""
    make().load("a", add("a"))
    elsewhere = root / "elsewhere"
    elsewhere.mkdir()
    record = make(allowed_roots=[elsewhere]).records()["a"]
    assert "outside the allowed roots" in record.unavailable
    assert make().records()["a"].unavailable is None


def test_a_restart_with_another_geometry_plans_anew(make, add, model_dir, root) -> None:
    record = make().load("a", add("a", rank=16))
    again = make(geometry=make_geometry(model_dir, page_tokens=4)).records()["a"]
    assert again.num_pages > record.num_pages and again.version == 1
    other = make_geometry(make_model(root / "other", "llama", hidden_size=128, head_dim=16))
    assert "q_proj" in make(geometry=other).records()["a"].unavailable


def test_what_a_scan_found_outlives_its_folder(make, add, root) -> None:
    add("a")
    registry = make()
    registry.scan(root)
    records = registry.records()
    shutil.rmtree(root / "a")
    again = make()
    again.scan(root)
    assert replace(again.records()["a"], unavailable=None) == records["a"]


def test_files_that_come_back_are_found(make, add, root) -> None:
    make().load("a", add("a"))
    (root / "a").rename(root / "away")
    registry = make()
    assert registry.records()["a"].unavailable
    position = registry.position
    registry.look_again()
    assert registry.position == position
    (root / "away").rename(root / "a")
    registry.look_again()
    record = registry.records()["a"]
    assert record.unavailable is None and record.version == 1 and registry.position > position


def test_what_a_disk_did_not_give_is_tried_again(make, add, model_dir, monkeypatch) -> None:
    """The files are as they were, so that nothing but time tells."""
    make().load("a", add("a"))
    # So that it is looked at at the start.
    other_geometry = make_geometry(model_dir, page_tokens=4)
    now, num_reads = 0.0, 0

    def failing(path, flags):
        nonlocal num_reads
        num_reads += 1
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(peft_weights, "_open_without_waiting", failing)
        registry = make(geometry=other_geometry, retries=Retries(lambda: now))
        assert "Input/output error" in registry.records()["a"].unavailable
        for _ in range(60):
            now += 10
            registry.look_again()
        assert num_reads == 1 + 5, "after 10, 20, 40, 80 and 160 s"
    now += 10
    registry.look_again()
    assert registry.records()["a"].unavailable
    now += MAX_PAUSE_S
    registry.look_again()
    assert registry.records()["a"].unavailable is None


def test_files_that_are_no_adapter_are_read_once(make, add, root, monkeypatch) -> None:
    make().load("a", add("a"))
    (root / "a" / "adapter_config.json").write_text("{}")
    registry = make()
    inspected = []
    inspect = registry._inspector.inspect
    monkeypatch.setattr(
        registry._inspector, "inspect", lambda *args: inspected.append(args) or inspect(*args)
    )
    for _ in range(3):
        registry.look_again()
    assert inspected == [] and "peft_type" in registry.records()["a"].unavailable
    (root / "a" / "adapter_config.json").write_text("[]")
    for _ in range(3):
        registry.look_again()
    assert len(inspected) == 1 and "JSON object" in registry.records()["a"].unavailable
    add("a", seed=5)
    registry.look_again()
    assert registry.records()["a"].unavailable is None and registry.records()["a"].version == 2
    registry.unload("a")
    registry.look_again()
    assert registry.records() == {}
