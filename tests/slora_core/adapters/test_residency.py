"""Slots and pages of resident adapters: pinning, eviction, dropping, random sequences."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
)

from slora_core.adapters.residency import AdapterResidency
from slora_core.memory.eviction import EvictionQueue
from slora_core.memory.page_pool import PageOwner, PagePool
from slora_core.requests import AdapterLoad


def _make(
    num_pages: int = 10, max_slots: int = 4
) -> tuple[PagePool, EvictionQueue, AdapterResidency]:
    pool = PagePool(num_pages)
    queue = EvictionQueue(pool)
    return pool, queue, AdapterResidency(pool, queue, max_slots)


def _use(residency: AdapterResidency, adapter_id: str, num_pages: int) -> AdapterLoad | None:
    """Acquire and release at once: the adapter ends idle, most recently used."""
    _, load = residency.acquire(adapter_id, num_pages)
    residency.release(adapter_id)
    return load


def test_first_use_loads_and_later_ones_hit() -> None:
    pool, _, residency = _make()
    slot, load = residency.acquire("a", 3)
    assert load is not None
    assert (load.adapter_id, load.slot, len(load.page_ids)) == ("a", slot, 3)
    assert pool.num_owned(PageOwner.ADAPTER) == 3
    assert residency.acquire("a", 3) == (slot, None)
    residency.release("a")
    assert residency.is_pinned("a"), "one of its two users is left"
    residency.release("a")
    assert not residency.is_pinned("a") and residency.resident_ids() == ["a"]
    assert residency.acquire("a", 3) == (slot, None)
    assert (residency.num_loads, residency.num_hits, residency.num_evictions) == (1, 2, 0)


def test_of_equally_popular_ones_the_least_recently_used_goes_first() -> None:
    pool, queue, residency = _make(num_pages=9)
    for adapter_id in "abc":
        assert _use(residency, adapter_id, 3) is not None
    for adapter_id in "acb":
        assert _use(residency, adapter_id, 3) is None
    queue.make_room(2)
    assert residency.resident_ids() == ["c", "b"]
    assert pool.num_free == 3
    queue.make_room(6)
    assert residency.resident_ids() == ["b"]
    assert residency.num_evictions == 2


def test_a_popular_one_stays_until_the_others_were_used_as_often() -> None:
    _, queue, residency = _make(num_pages=6)
    for _ in range(3):
        _use(residency, "popular", 3)
    for index in range(2):
        _use(residency, f"once-{index}", 3)
        assert "popular" in residency.resident_ids()
    # Each eviction moved the clock on: what is used now is worth what "popular" was then.
    for index in range(2, 5):
        _use(residency, f"once-{index}", 3)
    assert "popular" not in residency.resident_ids()
    assert residency.num_evictions == 4
    queue.make_room(6)
    assert residency.num_evictions == 6


def test_a_popular_one_ages_where_slots_bind_instead_of_pages() -> None:
    _, _, residency = _make(num_pages=100, max_slots=2)
    for _ in range(3):
        _use(residency, "popular", 3)
    for index in range(5):
        _use(residency, f"once-{index}", 3)
    assert "popular" not in residency.resident_ids()


def test_pinned_adapters_are_never_evicted() -> None:
    pool, queue, residency = _make(num_pages=6)
    residency.acquire("a", 3)
    _use(residency, "b", 3)
    queue.make_room(6)
    assert residency.resident_ids() == ["a"]
    assert pool.num_free == 3


def test_an_idle_adapter_is_not_evicted_to_make_room_for_itself() -> None:
    _, _, residency = _make(num_pages=4)
    _use(residency, "a", 4)
    assert residency.acquire("a", 4)[1] is None


def test_a_slot_is_freed_by_eviction_where_pages_are_plenty() -> None:
    _, _, residency = _make(num_pages=10, max_slots=2)
    slot_a, _ = residency.acquire("a", 1)
    _use(residency, "b", 1)
    assert residency.can_acquire("c")
    slot_c, load = residency.acquire("c", 1)
    assert load is not None and slot_c != slot_a
    assert residency.resident_ids() == ["a", "c"]
    assert not residency.can_acquire("d"), "both slots are pinned"
    assert residency.can_acquire("a")


def test_drop_of_an_idle_adapter_frees_its_pages_at_once() -> None:
    pool, _, residency = _make()
    _use(residency, "a", 3)
    residency.drop("a")
    assert residency.resident_ids() == [] and pool.num_free == 10
    assert residency.num_evictions == 0
    residency.drop("a")
    assert pool.num_free == 10


def test_drop_of_a_used_adapter_waits_for_its_last_user() -> None:
    pool, _, residency = _make()
    for _ in range(2):
        residency.acquire("a", 3)
    residency.drop("a")
    residency.release("a")
    assert residency.resident_ids() == ["a"]
    residency.release("a")
    assert residency.resident_ids() == [] and pool.num_free == 10


def test_use_after_drop_keeps_the_adapter() -> None:
    _, _, residency = _make()
    residency.acquire("a", 3)
    residency.drop("a")
    assert residency.acquire("a", 3)[1] is None
    residency.release("a")
    residency.release("a")
    assert residency.resident_ids() == ["a"]


def test_release_without_a_user_is_a_defect() -> None:
    _, _, residency = _make()
    _use(residency, "a", 1)
    with pytest.raises(KeyError):
        residency.release("a")


class ResidencyMachine(RuleBasedStateMachine):
    """Random uses against a model: who is pinned, who is idle in which order."""

    SIZES = {"a": 1, "b": 2, "c": 3, "d": 5, "e": 8}

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.queue, self.residency = _make(num_pages=12, max_slots=3)
        self.users = dict.fromkeys(self.SIZES, 0)
        self.idle: set[str] = set()
        self.dropped: set[str] = set()
        self.kv: list[int] = []
        self.slots: dict[str, int] = {}

    @property
    def pinned_pages(self) -> int:
        return sum(self.SIZES[name] for name, users in self.users.items() if users)

    @rule(name=st.sampled_from(sorted(SIZES)))
    def acquire(self, name: str) -> None:
        resident = self.users[name] > 0 or name in self.idle
        idle_pages = sum(self.SIZES[other] for other in self.idle)
        available = self.pool.num_free + idle_pages
        if not self.residency.can_acquire(name) or (not resident and self.SIZES[name] > available):
            assert not resident
            return
        slot, load = self.residency.acquire(name, self.SIZES[name])
        assert (load is None) == resident
        if resident:
            assert slot == self.slots[name]
        self.slots[name] = slot
        self.idle.discard(name)
        self._forget_evicted()
        self.users[name] += 1
        self.dropped.discard(name)

    @precondition(lambda self: any(self.users.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([name for name, users in self.users.items() if users]))
        self.residency.release(name)
        self.users[name] -= 1
        if not self.users[name]:
            if name in self.dropped:
                self.dropped.discard(name)
            else:
                self.idle.add(name)

    @rule(name=st.sampled_from(sorted(SIZES)))
    def drop(self, name: str) -> None:
        self.residency.drop(name)
        self.idle.discard(name)
        if self.users[name]:
            self.dropped.add(name)

    @rule(count=st.integers(0, 4))
    def take_kv(self, count: int) -> None:
        self.queue.make_room(count)
        self._forget_evicted()
        if self.pool.can_allocate(count):
            self.kv += self.pool.allocate(count, PageOwner.KV)
        else:
            assert not self.idle, "an idle adapter is kept though its pages are needed"

    @rule()
    def free_kv(self) -> None:
        self.pool.free(self.kv)
        self.kv = []

    def _forget_evicted(self) -> None:
        """Only idle adapters may be missing."""
        self.idle &= set(self.residency.resident_ids())

    @invariant()
    def agrees_with_the_model(self) -> None:
        pinned = {name for name, users in self.users.items() if users}
        assert set(self.residency.resident_ids()) == pinned | set(self.idle)
        assert self.residency.num_pinned_pages == self.pinned_pages
        assert all(self.residency.is_pinned(name) == (name in pinned) for name in self.SIZES)
        in_use = [self.slots[name] for name in (*pinned, *self.idle)]
        assert len(set(in_use)) == len(in_use), "two adapters share a slot"
        self.pool.check_integrity(self.kv, self.residency.page_ids())


TestResidencySequences = ResidencyMachine.TestCase
TestResidencySequences.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
