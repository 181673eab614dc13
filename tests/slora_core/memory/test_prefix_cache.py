"""Pages shared by prefix: what is found, who holds it, what is evicted, dropped adapters."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from slora_core.memory.eviction import EvictionQueue
from slora_core.memory.page_pool import PageOwner, PagePool
from slora_core.memory.prefix_cache import PrefixCache

PAGE = 4


class Holder:
    """A request's pages: `add` as when it starts, `release` as when it ends."""

    def __init__(self, cache: "Cache", adapter_id: str | None, tokens: list[int]) -> None:
        self.cache, self.adapter_id, self.tokens = cache, adapter_id, tokens
        prefixes, pool = cache.prefixes, cache.pool
        self.page_ids = prefixes.acquire(prefixes.match(adapter_id, tokens))
        self.num_matched = len(self.page_ids)
        missing = -(-len(tokens) // PAGE) - self.num_matched
        cache.queue.make_room(missing)
        self.page_ids += pool.allocate(missing, PageOwner.KV)
        self.num_held = prefixes.extend(adapter_id, tokens, self.page_ids, self.num_matched)

    def release(self) -> None:
        self.cache.prefixes.release(self.page_ids, self.num_held, self.num_matched)


class Cache:
    def __init__(self, num_pages: int, *, enabled: bool = True) -> None:
        self.pool = PagePool(num_pages)
        self.queue = EvictionQueue(self.pool)
        self.prefixes = PrefixCache(self.pool, self.queue, PAGE, enabled=enabled)

    def add(self, tokens: list[int], adapter_id: str | None = None) -> Holder:
        return Holder(self, adapter_id, tokens)

    def check(self, *holders: Holder) -> None:
        held = Counter(page_id for holder in holders for page_id in holder.page_ids)
        self.prefixes.check_integrity(held)
        self.pool.check_integrity([*held, *self.prefixes.idle_page_ids()], [])


def _tokens(num: int, seed: int = 0) -> list[int]:
    return [seed * 1000 + i for i in range(num)]


def test_full_pages_are_shared_while_in_use_and_afterwards() -> None:
    cache = Cache(20)
    first = cache.add(_tokens(14))
    assert (first.num_matched, first.num_held) == (0, 3), "its last page is not full"
    second = cache.add(_tokens(14))
    assert second.num_matched == 3
    assert second.page_ids[:3] == first.page_ids[:3]
    assert second.page_ids[3] != first.page_ids[3]
    assert cache.prefixes.num_shared_pages == 3
    cache.check(first, second)
    first.release()
    cache.check(second)
    assert (cache.prefixes.num_shared_pages, cache.prefixes.num_idle_pages) == (3, 0)
    second.release()
    cache.check()
    assert (cache.prefixes.num_shared_pages, cache.prefixes.num_idle_pages) == (0, 3)
    assert cache.pool.num_free == 17
    assert cache.add(_tokens(10)).page_ids[:2] == first.page_ids[:2]


@pytest.mark.parametrize("num_tokens,num_pages", [(1, 0), (5, 0), (6, 1), (9, 1), (10, 2), (30, 3)])
def test_two_tokens_at_least_are_left_to_compute(num_tokens: int, num_pages: int) -> None:
    cache = Cache(20)
    cache.add(_tokens(12))
    assert len(cache.prefixes.match(None, _tokens(num_tokens))) == num_pages


def test_a_page_is_found_by_all_tokens_before_it() -> None:
    cache = Cache(20)
    cache.add(_tokens(12))
    other = [99, *_tokens(14)[1:]]
    assert cache.prefixes.match(None, other) == []
    other = [*_tokens(4), 99, *_tokens(14)[5:]]
    assert len(cache.prefixes.match(None, other)) == 1


def test_pages_are_found_behind_a_page_that_is_held() -> None:
    cache = Cache(20)
    tokens = _tokens(14)
    short = cache.add(tokens[:5])
    assert cache.prefixes.match(None, tokens[4:], short.page_ids[0]) == []
    long = cache.add(tokens)
    found = cache.prefixes.match(None, tokens[4:], short.page_ids[0])
    assert [page.page_id for page in found] == long.page_ids[1:3]
    assert cache.prefixes.match(None, _tokens(10, seed=1), short.page_ids[0]) == []
    # What the first one computed, and the second found, counts as found by both.
    assert cache.prefixes.num_shared_pages == 1
    cache.prefixes.share(short.page_ids[: short.num_held])
    assert cache.prefixes.num_shared_pages == 1
    short.num_matched = short.num_held
    long.release()
    cache.check(short)
    assert cache.prefixes.num_shared_pages == 1, "of the one that is left"
    cache.prefixes.drop("another adapter")
    short.release()
    cache.check()
    assert cache.prefixes.num_shared_pages == 0


def test_nothing_is_found_behind_a_page_of_an_adapter_that_was_dropped() -> None:
    cache = Cache(20)
    short, long = cache.add(_tokens(5), "a"), cache.add(_tokens(14), "a")
    cache.prefixes.drop("a")
    assert cache.prefixes.match("a", _tokens(14)[4:], short.page_ids[0]) == []
    short.release()
    long.release()
    cache.check()


def test_nothing_is_shared_between_adapters() -> None:
    cache = Cache(20)
    for adapter_id in (None, "version-1", "version-2"):
        assert cache.add(_tokens(12), adapter_id).num_matched == 0
    assert cache.pool.num_free == 11
    assert cache.add(_tokens(12), "version-1").num_matched == 2


def test_pages_of_tokens_that_are_there_already_stay_their_requests_own() -> None:
    cache = Cache(20)
    twins = [cache.add(_tokens(6)), cache.add(_tokens(6))]
    for twin in twins:
        twin.tokens += [7] * 6
        twin.page_ids += cache.pool.allocate(1, PageOwner.KV)
        twin.num_held = cache.prefixes.extend(None, twin.tokens, twin.page_ids, twin.num_held)
    assert [twin.num_held for twin in twins] == [3, 1]
    cache.check(*twins)
    for twin in twins:
        twin.release()
    cache.check()
    assert cache.prefixes.num_idle_pages == 3


def test_leaves_are_evicted_before_what_they_depend_on() -> None:
    cache = Cache(6)
    cache.add(_tokens(24)).release()
    assert cache.pool.num_free == 0
    for num_free in range(1, 7):
        cache.queue.make_room(num_free)
        cache.check()
        assert len(cache.prefixes.match(None, _tokens(40))) == 6 - num_free
    assert cache.prefixes.match(None, _tokens(40)) == []
    assert not cache.prefixes._roots, "adapters that are gone leave nothing"


def test_what_is_in_use_is_not_evicted() -> None:
    cache = Cache(6)
    cache.add(_tokens(24)).release()
    holder = cache.add(_tokens(14))
    cache.queue.make_room(6)
    cache.check(holder)
    assert cache.pool.num_free == 2
    assert len(cache.prefixes.match(None, _tokens(40))) == 3


def test_a_prefix_in_demand_outlives_others() -> None:
    cache = Cache(10)
    for _ in range(3):
        cache.add(_tokens(14)).release()
    for seed in range(1, 6):
        cache.add(_tokens(12, seed)).release()
    cache.check()
    assert len(cache.prefixes.match(None, _tokens(40))) == 3


def test_an_adapter_that_is_dropped_takes_its_prefixes_along() -> None:
    cache = Cache(20)
    cache.add(_tokens(12, 1), "a").release()
    cache.add(_tokens(12)).release()
    held = cache.add(_tokens(9), "a")
    cache.prefixes.drop("a")
    cache.prefixes.drop("unknown")
    cache.check(held)
    assert cache.prefixes.match("a", _tokens(40)) == []
    assert cache.pool.num_free == 20 - 3 - 3
    # What it computes from now on is not kept either.
    held.tokens += _tokens(8, 2)
    held.page_ids += cache.pool.allocate(2, PageOwner.KV)
    assert cache.prefixes.extend("a", held.tokens, held.page_ids, held.num_held) == 2
    # Loaded again meanwhile, it starts from nothing.
    again = cache.add(_tokens(9), "a")
    assert again.num_matched == 0
    cache.check(held, again)
    held.release()
    again.release()
    cache.check()
    assert cache.prefixes.num_idle_pages == 3 + 2
    assert cache.pool.num_free == 15


def test_disabled_it_finds_and_keeps_nothing() -> None:
    cache = Cache(20, enabled=False)
    holders = [cache.add(_tokens(14)), cache.add(_tokens(14))]
    assert all(holder.num_held == holder.num_matched == 0 for holder in holders)
    cache.check(*holders)
    for holder in holders:
        holder.release()
    assert cache.pool.num_free == 20


class PrefixMachine(RuleBasedStateMachine):
    """Random requests over few texts, so that most prefixes are shared, in a small pool."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = Cache(16)
        self.holders: list[Holder] = []
        # What every page held by someone was written with.
        self.written: dict[int, tuple[str | None, tuple[int, ...]]] = {}

    @rule(
        num_tokens=st.integers(1, 24),
        change=st.integers(0, 24),
        adapter_id=st.sampled_from([None, "a"]),
    )
    def start(self, num_tokens: int, change: int, adapter_id: str | None) -> None:
        tokens = [0] * num_tokens
        if change < num_tokens:
            tokens[change] = 1
        held = sum(len(set(holder.page_ids)) for holder in self.holders)
        if held + -(-num_tokens // PAGE) > 16:
            return
        holder = self.cache.add(tokens, adapter_id)
        assert num_tokens - PAGE * holder.num_matched >= 2 or not holder.num_matched
        for index, page_id in enumerate(holder.page_ids):
            content = adapter_id, tuple(tokens[: (index + 1) * PAGE])
            if index < holder.num_matched:
                assert self.written[page_id] == content, "another text's page was found"
            self.written[page_id] = content
        self.holders.append(holder)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.holders) - 1))
        self.holders.pop(index).release()

    @rule(num_pages=st.integers(0, 16))
    def make_room(self, num_pages: int) -> None:
        self.cache.queue.make_room(num_pages)
        held = {page_id for holder in self.holders for page_id in holder.page_ids}
        assert self.cache.pool.num_free >= min(num_pages, 16 - len(held))

    @rule()
    def drop(self) -> None:
        self.cache.prefixes.drop("a")
        assert self.cache.prefixes.match("a", [0] * 24) == []

    @invariant()
    def books_balance(self) -> None:
        self.cache.check(*self.holders)


TestPrefixSequences = PrefixMachine.TestCase
TestPrefixSequences.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
