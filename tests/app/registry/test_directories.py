"""Another directory of adapters in place of the one before, in a registry that runs."""

import pytest

from slora_core.errors import AdapterPathError


@pytest.fixture
def add_in(add):
    """Adds an adapter to one of two directories; its content is the seed's."""
    return lambda directory, name, seed: add(f"{directory}/{name}", seed=seed)


@pytest.fixture
def registry(make, add_in, root):
    """It serves directory `old`, and what was loaded by hand."""
    add_in("old", "only-old", 1)
    add_in("old", "both", 2)
    add_in("old", "same", 3)
    add_in("new", "both", 4)
    add_in("new", "same", 3)
    add_in("new", "only-new", 5)
    registry = make()
    registry.use_directories(str(root / "old"), [str(root)])
    return registry


def test_adapters_of_the_new_directory_take_the_place_of_the_old_ones(registry, root) -> None:
    before = registry.records()
    assert set(before) == {"only-old", "both", "same"}
    registry.use_directories(str(root / "new"), [str(root)])
    after = registry.records()
    assert set(after) == {"only-new", "both", "same"}
    assert {record.path for record in after.values()} == {f"{root}/new/{name}" for name in after}
    # The same content is the same version, which requests that run go on with.
    assert (after["both"].version, after["same"].version) == (2, 1)
    assert after["same"].adapter_id == before["same"].adapter_id
    assert all(record.unavailable is None for record in after.values())


def test_a_name_that_both_have_is_never_away(registry, root, monkeypatch) -> None:
    """Requests come while the new directory is read."""
    seen = []
    inspect = registry._inspector.inspect

    def seeing(*args):
        seen.append(registry.records())
        return inspect(*args)

    monkeypatch.setattr(registry._inspector, "inspect", seeing)
    position = registry.position
    registry.use_directories(str(root / "new"), [str(root)])
    assert len(seen) == 3 and all({"both", "same", "only-old"} <= set(names) for names in seen)
    changes = registry.changes_since(position)
    assert changes.removed == {"only-old"} and set(changes.records) == {"only-new", "both", "same"}


def test_what_was_loaded_by_hand_stays(registry, add_in, root) -> None:
    registry.load("mine", add_in("elsewhere", "mine", 6))
    # Of the old directory, and asked for by name.
    registry.load("only-old", root / "old" / "only-old")
    registry.use_directories(str(root / "new"), [str(root / "new"), str(root / "old")])
    records = registry.records()
    assert set(records) == {"only-new", "both", "same", "mine", "only-old"}
    assert records["only-old"].unavailable is None
    assert "outside the allowed roots" in records["mine"].unavailable
    registry.use_directories(None, [str(root)])
    assert set(registry.records()) == {"mine", "only-old"}
    assert registry.records()["mine"].unavailable is None


def test_back_to_the_old_directory(registry, root, make) -> None:
    registry.unload("both")
    before = registry.records()
    registry.use_directories(str(root / "new"), [str(root)])
    # What was unloaded was the other directory's.
    assert registry.records()["both"].path == f"{root}/new/both"
    registry.use_directories(str(root / "old"), [str(root)])
    assert set(registry.records()) == set(before) | {"both"}
    # A restart finds the same.
    assert make().records() == registry.records()


def test_a_restart_with_another_directory_is_a_change(registry, root, make) -> None:
    again = make()
    again.use_directories(str(root / "new"), [str(root)])
    assert set(again.records()) == {"only-new", "both", "same"}


def test_what_is_broken_in_the_new_directory_stays_as_it_was(registry, root) -> None:
    before = registry.records()["both"]
    (root / "new" / "both" / "adapter_config.json").write_text("{}")
    registry.use_directories(str(root / "new"), [str(root)])
    assert set(registry.records()) == {"only-new", "same", "both"}
    assert registry.records()["both"] == before


def test_a_directory_that_cannot_be_listed_changes_nothing(registry, root) -> None:
    before = registry.records()
    with pytest.raises(AdapterPathError, match="cannot list"):
        registry.use_directories(str(root / "nowhere"), [str(root / "nowhere")])
    assert registry.records() == before
    assert registry.load("only-old", root / "old" / "only-old").path == f"{root}/old/only-old"
