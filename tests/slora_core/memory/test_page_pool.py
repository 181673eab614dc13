"""Every page has one owner through any sequence of takes and returns."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slora_core.memory.page_pool import PageOwner, PagePool


@pytest.mark.parametrize("num_pages", [0, -1])
def test_refuses_an_empty_pool(num_pages: int) -> None:
    with pytest.raises(ValueError, match=f"num_pages is {num_pages}"):
        PagePool(num_pages)


def test_counts_by_owner() -> None:
    pool = PagePool(10)
    kv, adapter = pool.allocate(3, PageOwner.KV), pool.allocate(2, PageOwner.ADAPTER)
    assert [pool.num_owned(owner) for owner in PageOwner] == [5, 3, 2]
    assert pool.num_free == 5
    assert pool.can_allocate(5) and not pool.can_allocate(6)
    pool.check_integrity(kv, adapter)
    pool.free(kv)
    assert [pool.num_owned(owner) for owner in PageOwner] == [8, 0, 2]
    pool.check_integrity([], adapter)


def test_zero_pages_are_no_pages() -> None:
    pool = PagePool(2)
    assert pool.allocate(0, PageOwner.KV) == []
    pool.check_integrity([], [])


def test_pages_of_one_owner_are_adjacent_again_after_a_return() -> None:
    pool = PagePool(12)
    first = pool.allocate(5, PageOwner.ADAPTER)
    assert first == [0, 1, 2, 3, 4]
    second = pool.allocate(4, PageOwner.KV)
    pool.free(first)
    assert pool.allocate(5, PageOwner.ADAPTER) == first
    pool.free(second)
    assert pool.allocate(3, PageOwner.KV) == second[:3]


def test_misuse_asserts() -> None:
    pool = PagePool(4)
    page_ids = pool.allocate(2, PageOwner.KV)
    with pytest.raises(AssertionError, match="3 pages wanted, 2 free"):
        pool.allocate(3, PageOwner.ADAPTER)
    with pytest.raises(AssertionError):
        pool.allocate(1, PageOwner.FREE)
    pool.free(page_ids[:1])
    with pytest.raises(AssertionError, match=f"page {page_ids[0]} is free already"):
        pool.free(page_ids)


def test_check_integrity_finds_defects() -> None:
    pool = PagePool(4)
    kv, adapter = pool.allocate(1, PageOwner.KV), pool.allocate(1, PageOwner.ADAPTER)
    pool.check_integrity(kv, adapter)
    wrong = [
        # Lost, held twice, held by both, of the wrong owner, free and held.
        ([], adapter),
        (kv + kv, adapter),
        (kv, adapter + kv),
        (adapter, kv),
        (kv, [*adapter, 3]),
    ]
    for held_kv, held_adapter in wrong:
        with pytest.raises(AssertionError):
            pool.check_integrity(held_kv, held_adapter)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.lists(
        st.tuples(st.sampled_from([PageOwner.KV, PageOwner.ADAPTER]), st.integers(0, 15)),
        max_size=60,
    ),
    st.randoms(use_true_random=False),
)
def test_random_sequences_keep_integrity(num_pages, operations, rng) -> None:
    pool = PagePool(num_pages)
    held: list[tuple[PageOwner, list[int]]] = []
    for owner, count in operations:
        if pool.can_allocate(count):
            page_ids = pool.allocate(count, owner)
            assert len(set(page_ids)) == count
            held.append((owner, page_ids))
        elif held:
            pool.free(held.pop(rng.randrange(len(held)))[1])
        by_owner = {
            owner: [page_id for other, ids in held if other is owner for page_id in ids]
            for owner in (PageOwner.KV, PageOwner.ADAPTER)
        }
        pool.check_integrity(by_owner[PageOwner.KV], by_owner[PageOwner.ADAPTER])
        assert pool.num_free == num_pages - sum(len(ids) for ids in by_owner.values())
