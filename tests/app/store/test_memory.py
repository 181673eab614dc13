"""Random sequences against the host store, eviction order, and what is left after kills."""

import gc
import mmap
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.store.memory import HostStore
from slora_core.adapters.page_layout import (
    LoraWeights,
    pack_adapter,
    plan_layout,
)
from slora_core.adapters.slab_format import HEADER_BYTES
from slora_core.adapters.slab_reader import SlabReader
from slora_core.errors import AdapterNotFoundError, StoreFullError, StoreGoneError
from tests.factories import uniform_geometry

PAGE = mmap.PAGESIZE
DIMS = {"q_proj": (64, 64), "k_proj": (64, 32), "down_proj": (128, 64)}
# A rank of q_proj is 128 elements a layer, so that rank 8 r is r memory pages in fp32.
GEOMETRY = uniform_geometry(2, PAGE // 8, DIMS)
ME = os.getpid()


def make_weights(seed: int, num_pages: int):
    """(layout, weights) of a q_proj-only adapter that takes `num_pages` memory pages."""
    generator = torch.Generator().manual_seed(seed)
    rank = 4 * num_pages * (PAGE // 4096)
    weights = {
        (layer, 0): LoraWeights(
            torch.randn(rank, 64, generator=generator),
            torch.randn(64, rank, generator=generator),
            2.0,
        )
        for layer in range(GEOMETRY.num_layers)
    }
    layout = plan_layout(GEOMETRY, dict.fromkeys(weights, rank), dict.fromkeys(weights, 2.0))
    assert layout.num_pages * GEOMETRY.page_bytes == num_pages * PAGE
    return layout, weights


def put(store: HostStore, name: str, num_pages: int = 1, seed: int = 0, **options) -> bool:
    return store.put(name, *make_weights(seed, num_pages), **options)


@pytest.fixture
def store():
    made = HostStore(GEOMETRY, capacity_bytes=9 * PAGE, extent_bytes=9 * PAGE)
    yield made
    made.close()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    capacity=st.integers(3, 40),
    extent=st.integers(2, 20),
    punch_holes=st.booleans(),
)
def test_random_sequences(seed: int, capacity: int, extent: int, punch_holes: bool) -> None:
    rng = random.Random(seed)
    store = HostStore(GEOMETRY, capacity * PAGE, extent * PAGE, punch_holes)
    reader = SlabReader(GEOMETRY)
    sizes = {f"a{i}": rng.choice([1, 1, 2, 3, 5, 8, 21]) for i in range(14)}
    leases: Counter[tuple[str, int]] = Counter()
    views = {}
    expected = {}
    holders = [ME, os.getppid()]
    for index, name in enumerate(sizes):
        layout, weights = make_weights(index, sizes[name])
        expected[name] = layout, weights, pack_adapter(GEOMETRY, layout, weights)
    for _ in range(60):
        name, holder = rng.choice(list(sizes)), rng.choice(holders)
        held = sum(count for (held_name, _), count in leases.items() if held_name == name)
        match rng.choice(["put", "put", "lease", "lease", "release", "remove", "drop"]):
            case "put":
                layout, weights, _ = expected[name]
                present = name in store
                try:
                    packed = store.put(name, layout, weights, evict=rng.random() < 0.8)
                    assert packed != present
                except StoreFullError:
                    assert not present
            case "lease":
                present = name in store
                try:
                    views[name] = reader.open(store.lease(name, holder)).pages
                    leases[name, holder] += 1
                    assert present
                except AdapterNotFoundError:
                    assert not present
            case "release":
                released = store.release(name, holder)
                assert released == (leases[name, holder] > 0)
                leases[name, holder] -= released
            case "remove":
                present = name in store
                assert store.remove(name) == present
                assert (name in store) == (held > 0)
            case "drop":
                ended = sum(n for (_, pid), n in leases.items() if pid == holder)
                assert store.drop_holder(holder) == ended
                leases = Counter({key: n for key, n in leases.items() if key[1] != holder})
        store.check_integrity()
        for held_name in {key[0] for key, n in leases.items() if n}:
            assert held_name in store, "a leased adapter was lost"
            assert torch.equal(views[held_name], expected[held_name][2])
    stats = store.stats()
    assert stats.num_leases == leases.total() and stats.used_bytes <= stats.extent_bytes
    for holder in holders:
        store.drop_holder(holder)
    for name in sizes:
        store.remove(name)
    store.check_integrity()
    assert store.stats().used_bytes == 0 and store.stats().num_draining == 0
    store.close()


def test_once_per_content_hash(store: HostStore) -> None:
    assert put(store, "a") and not put(store, "a")
    assert store.stats().num_packs == 1 and store.adapter_ids() == ["a"]


def test_lease_of_an_unknown_adapter_or_process(store: HostStore) -> None:
    with pytest.raises(AdapterNotFoundError):
        store.lease("a", ME)
    put(store, "a")
    with pytest.raises(ProcessLookupError):
        store.lease("a", 2**22 + 1)
    store.check_integrity()
    assert not store.release("a", ME) and not store.release("b", ME)


def test_removal_waits_for_the_last_lease(store: HostStore) -> None:
    put(store, "a", seed=3)
    location = store.lease("a", ME)
    store.lease("a", ME)
    assert store.remove("a")
    view = SlabReader(GEOMETRY).open(location).pages
    assert store.stats().num_draining == 1 and store.adapter_ids() == []
    store.release("a", ME)
    assert torch.equal(view, pack_adapter(GEOMETRY, *make_weights(3, 1)))
    store.release("a", ME)
    assert "a" not in store and store.stats().used_bytes == 0


def test_put_takes_a_draining_adapter_back(store: HostStore) -> None:
    put(store, "a")
    store.lease("a", ME)
    store.remove("a")
    assert not put(store, "a")
    store.release("a", ME)
    assert "a" in store


def test_full_store_says_the_sizes(store: HostStore) -> None:
    with pytest.raises(StoreFullError, match=r"takes 0\.0 MiB .* holds 0\.0 MiB in all"):
        put(store, "huge", 9)
    put(store, "a", 8)
    store.lease("a", ME)
    with pytest.raises(StoreFullError, match="under leases"):
        put(store, "b", 1)
    with pytest.raises(StoreFullError):
        put(store, "b", 1, evict=False)
    store.release("a", ME)
    with pytest.raises(StoreFullError):
        put(store, "b", 1, evict=False)
    assert put(store, "b", 1) and "a" not in store


def test_least_recently_used_of_equals_goes_first(store: HostStore) -> None:
    for name in "abcdefgh":
        put(store, name)
    store.lease("b", ME)
    store.release("b", ME)
    put(store, "first")  # evicts one of equal priority, and the clock moves on
    survivors = [name for name in "acdefgh" if name in store]
    for name in survivors[:3]:
        store.lease(name, ME)
        store.release(name, ME)
    for i in range(3):
        put(store, f"new{i}")
    assert all(name in store for name in ["b", *survivors[:3]])


def test_popular_outlives_unpopular(store: HostStore) -> None:
    put(store, "popular")
    for _ in range(10):
        store.lease("popular", ME)
        store.release("popular", ME)
    for i in range(30):
        put(store, f"once{i}")
    assert "popular" in store
    for i in range(3000):
        put(store, f"more{i}")
        if "popular" not in store:
            break
    assert "popular" not in store, "popularity must age"


def test_one_large_cold_adapter_goes_rather_than_the_small_hot(store: HostStore) -> None:
    put(store, "large", 4)
    for name in "wxyz":
        put(store, name)
    for name in "wxyz":
        store.lease(name, ME)
        store.release(name, ME)
    put(store, "new", 3)
    assert "large" not in store and all(name in store for name in "wxyz")


def test_an_adapter_larger_than_an_extent_gets_its_own() -> None:
    store = HostStore(GEOMETRY, capacity_bytes=24 * PAGE, extent_bytes=4 * PAGE)
    for name in "abcdefghi":
        put(store, name)
    assert put(store, "big", 20)
    store.check_integrity()
    location = store.lease("big", ME)
    assert location.extent_bytes == 20 * PAGE + HEADER_BYTES
    assert len([name for name in "abcdefghi" if name in store]) == 0
    store.remove("big")
    store.release("big", ME)
    assert store.stats().extent_bytes == 0


def test_freed_ranges_give_memory_back() -> None:
    store = HostStore(GEOMETRY, capacity_bytes=100 * PAGE, extent_bytes=100 * PAGE)
    put(store, "a", 40)
    put(store, "b", 20)
    fd = store.lease("b", ME).extent.fd
    assert os.fstat(fd).st_blocks * 512 == 61 * PAGE
    store.remove("a")
    assert os.fstat(fd).st_blocks * 512 == 21 * PAGE
    store.close()


def test_capacity_too_small() -> None:
    with pytest.raises(ValueError, match="capacity_bytes is 10"):
        HostStore(GEOMETRY, capacity_bytes=10)


def test_a_failed_pack_leaves_nothing(store: HostStore) -> None:
    layout, weights = make_weights(0, 1)
    with pytest.raises(KeyError):
        store.put("a", layout, {key: weights[key] for key in [(0, 0)]})
    store.check_integrity()
    assert "a" not in store and put(store, "a")


def test_concurrent_puts_pack_once_each() -> None:
    store = HostStore(GEOMETRY, capacity_bytes=64 * PAGE, extent_bytes=16 * PAGE)
    made = [make_weights(i, 2) for i in range(6)]

    def work(order: list[int]) -> None:
        for i in order:
            store.put(f"a{i}", *made[i])
            location = store.lease(f"a{i}", ME)
            pages = SlabReader(GEOMETRY).open(location).pages
            assert torch.equal(pages, pack_adapter(GEOMETRY, *made[i]))
            store.release(f"a{i}", ME)

    rng = random.Random(0)
    threads = [threading.Thread(target=work, args=(rng.sample(range(6), 6),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.check_integrity()
    assert store.stats().num_packs == 6 and store.stats().num_leases == 0


def test_a_holders_death_is_noticed_and_ends_its_leases(store: HostStore) -> None:
    put(store, "a")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    store.lease("a", child.pid)
    store.lease("a", child.pid)
    store.lease("a", ME)
    assert store.dead_holders() == []
    child.kill()
    deadline = time.monotonic() + 10
    while not store.dead_holders() and time.monotonic() < deadline:
        time.sleep(0.01)
    # Not reaped yet: a zombie holds nothing either.
    assert store.dead_holders() == [child.pid]
    assert store.drop_holder(child.pid) == 2 and store.dead_holders() == []
    child.wait()
    store.check_integrity()
    assert store.stats().num_leases == 1 and store.stats().num_holders == 1


def test_a_lease_in_a_dead_holders_name_ends_what_it_held(store: HostStore) -> None:
    for name in ("a", "b"):
        put(store, name)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    store.lease("a", child.pid)
    store.lease("b", child.pid)
    store.remove("b")
    child.kill()
    child.wait()
    with pytest.raises(AdapterNotFoundError):
        store.lease("b", child.pid)
    with pytest.raises(ProcessLookupError):
        store.lease("a", child.pid)
    store.check_integrity()
    assert store.stats().num_leases == 0 and store.adapter_ids() == ["a"]


def test_a_reader_maps_an_extent_once_and_forgets_dead_ones() -> None:
    reader = SlabReader(GEOMETRY)
    first = HostStore(GEOMETRY, 16 * PAGE, 16 * PAGE)
    put(first, "a", seed=1)
    put(first, "b", seed=2)
    old = first.lease("a", ME)
    view = reader.open(old).pages
    reader.open(first.lease("b", ME))
    assert len(reader._mappings) == 1
    first.close()
    second = HostStore(GEOMETRY, 16 * PAGE, 16 * PAGE)
    put(second, "a", seed=5)
    new = second.lease("a", ME)
    assert new.extent.fd == old.extent.fd, "the descriptor is reused, as the test needs"
    assert torch.equal(reader.open(new).pages, pack_adapter(GEOMETRY, *make_weights(5, 1)))
    assert len(reader._mappings) == 1
    # The old view is still whole, and a late reader of the old location is not fooled.
    assert torch.equal(view, pack_adapter(GEOMETRY, *make_weights(1, 1)))
    with pytest.raises(StoreGoneError, match="is not slab"):
        SlabReader(GEOMETRY).open(old)
    second.close()
    with pytest.raises(StoreGoneError, match="cannot open"):
        SlabReader(GEOMETRY).open(new)


def _memfd_mappings() -> int:
    return sum("slora-slab" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_views_keep_the_mapping_and_nothing_else_does() -> None:
    gc.collect()
    before = _memfd_mappings()
    store = HostStore(GEOMETRY, 16 * PAGE, 16 * PAGE)
    put(store, "a")
    reader = SlabReader(GEOMETRY)
    row = reader.open(store.lease("a", ME)).pages[0, 1]
    store.close()
    reader.close()
    assert _memfd_mappings() == before + 1
    del row
    assert _memfd_mappings() == before


_STORE_PROCESS = """
    import os, sys, pickle
    from slora_core.adapters.slab_reader import SlabReader
    from tests.app.store.test_memory import GEOMETRY, HostStore, PAGE, put
    store = HostStore(GEOMETRY, 64 * PAGE, 64 * PAGE)
    put(store, "a", 20, seed=7)
    location = store.lease("a", os.getppid())
    sys.stdout.buffer.write(pickle.dumps(location).hex().encode() + b"\\n")
    sys.stdout.buffer.flush()
    sys.stdin.read()
"""


def test_nothing_remains_after_a_kill() -> None:
    """The reader is here, its store in a process that is killed: the view lives, then all goes."""
    import pickle

    def listing() -> set[str]:
        return {str(path) for root in ("/dev/shm", "/tmp") for path in Path(root).glob("*slora*")}

    files = listing()
    gc.collect()
    mappings = _memfd_mappings()
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_STORE_PROCESS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    assert process.stdout is not None
    location = pickle.loads(bytes.fromhex(process.stdout.readline().decode()))
    reader = SlabReader(GEOMETRY)
    pages = reader.open(location).pages
    expected = pack_adapter(GEOMETRY, *make_weights(7, 20))
    assert torch.equal(pages, expected)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert torch.equal(pages, expected)
    with pytest.raises(StoreGoneError):
        SlabReader(GEOMETRY).open(location)
    reader.close()
    del pages
    assert _memfd_mappings() == mappings, "the last mapping, and with it the memory, is gone"
    assert listing() == files


def test_a_location_is_small() -> None:
    import pickle

    store = HostStore(GEOMETRY, 64 * PAGE)
    put(store, "a", 8)
    assert len(pickle.dumps(store.lease("a", ME))) < 4096
    store.close()
