"""Full KV pages that requests share by prefix: a tree of pages for each adapter.

A page is found by the adapter's content hash and all tokens up to its end, compared one by one,
so nothing is shared across adapters or their versions. Pages are held by the requests that use
them; idle ones stay until the eviction queue wants them. Knows no requests: the running set asks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from slora_core.memory.eviction import CacheEntry, EvictionQueue
from slora_core.memory.page_pool import PagePool

# To compute a page of KV against copying a page of an adapter, which is 1: on an H100 16 tokens of
# a 7B model take 0.34 ms of a step, their 8 MiB from pinned memory 0.15 ms beside one.
_PAGE_COST = 2.0


@dataclass(eq=False)
class PrefixRoot:
    """Where the pages of one adapter begin, or of the base model (None)."""

    adapter_id: str | None
    children: dict[tuple[int, ...], "PrefixPage"] = field(default_factory=dict)


@dataclass(eq=False)
class PrefixPage(CacheEntry):
    """One full page of KV; its parent has the tokens before its own."""

    page_id: int
    tokens: tuple[int, ...]
    parent: "PrefixPage | PrefixRoot"
    children: dict[tuple[int, ...], "PrefixPage"] = field(default_factory=dict)
    # Requests that hold the page, and those among them that found it here.
    num_users: int = 0
    num_sharers: int = 0
    # Of an adapter that was dropped: found no more, freed with its last user.
    detached: bool = False


class PrefixCache:
    """A held page's parent is held too, so idle pages can always be evicted, leaves first.

    Args:
        enabled: False finds and keeps nothing.
    """

    def __init__(
        self, pool: PagePool, queue: EvictionQueue, page_tokens: int, *, enabled: bool = True
    ) -> None:
        self._pool = pool
        self._queue = queue
        self._page_tokens = page_tokens
        self._enabled = enabled
        self._roots: dict[str | None, PrefixRoot] = {}
        self._pages: dict[int, PrefixPage] = {}
        # Pages without users, and pages with sharers.
        self.num_idle_pages = 0
        self.num_shared_pages = 0

    def idle_page_ids(self) -> list[int]:
        return [page.page_id for page in self._pages.values() if not page.num_users]

    def match(
        self, adapter_id: str | None, token_ids: Sequence[int], after: int | None = None
    ) -> list[PrefixPage]:
        """The longest run of pages for the tokens, all but the last two at most.

        One token more than sampling needs is left to compute: the first step of a request then is
        a prefill, which may bring any number of pages, and never a decode.

        Args:
            after: id of the page here that has the tokens before; None where these are the first.
        """
        found: list[PrefixPage] = []
        node = self._roots.get(adapter_id) if after is None else self._pages[after]
        if isinstance(node, PrefixPage) and node.detached:
            return found
        size = self._page_tokens
        for start in range(0, len(token_ids) - size - 1, size):
            page = node.children.get(tuple(token_ids[start : start + size])) if node else None
            if page is None:
                break
            found.append(page)
            node = page
        return found

    def num_newly_shared(self, pages: Sequence[PrefixPage]) -> int:
        """By how much `num_shared_pages` would grow if they were acquired."""
        return sum(not page.num_sharers for page in pages)

    def acquire(self, pages: Sequence[PrefixPage]) -> list[int]:
        """Hold what `match` found for one more request; returns the page ids."""
        for page in pages:
            if not page.num_users:
                self._queue.discard(page)
                self.num_idle_pages -= 1
            page.num_uses += 1
            page.num_users += 1
            self.num_shared_pages += not page.num_sharers
            page.num_sharers += 1
        return [page.page_id for page in pages]

    def share(self, page_ids: Sequence[int]) -> None:
        """Count pages that a request computed as ones that it found, as those behind them are."""
        for page_id in page_ids:
            page = self._pages[page_id]
            self.num_shared_pages += not page.num_sharers
            page.num_sharers += 1

    def extend(
        self,
        adapter_id: str | None,
        token_ids: Sequence[int],
        page_ids: Sequence[int],
        num_held: int,
    ) -> int:
        """Let others find a request's full pages after its first `num_held`, which are here.

        Ends early at tokens that another page has already: this request keeps a copy of its own.

        Args:
            token_ids: tokens whose KV every step from the next one on finds on `page_ids`.

        Returns:
            How many of the request's first pages are here now, held by it.
        """
        if not self._enabled:
            return 0
        size = self._page_tokens
        parent: PrefixRoot | PrefixPage
        if num_held:
            parent = self._pages[page_ids[num_held - 1]]
            if parent.detached:
                return num_held
        else:
            parent = self._roots.setdefault(adapter_id, PrefixRoot(adapter_id))
        for index in range(num_held, len(token_ids) // size):
            tokens = tuple(token_ids[index * size : (index + 1) * size])
            if tokens in parent.children:
                return index
            page = PrefixPage(page_ids[index], tokens, parent, num_users=1, num_uses=1)
            self._pages[page.page_id] = parent.children[tokens] = page
            parent = page
            num_held += 1
        return num_held

    def release(self, page_ids: Sequence[int], num_held: int, num_matched: int) -> None:
        """One user less for a request's pages; those that are not here are freed.

        Args:
            num_held, num_matched: the first pages that are here, and that the request found here.
        """
        for index in range(num_held):
            page = self._pages[page_ids[index]]
            page.num_users -= 1
            if index < num_matched:
                page.num_sharers -= 1
                self.num_shared_pages -= not page.num_sharers
            if not page.num_users:
                self._retire(page)
        self._pool.free(page_ids[num_held:])

    def drop(self, adapter_id: str | None) -> None:
        """Forget an adapter's pages (None: the base model's).

        Idle ones are freed, held ones with their last user.
        """
        root = self._roots.pop(adapter_id, None)
        pages = [] if root is None else list(root.children.values())
        while pages:
            page = pages.pop()
            pages += page.children.values()
            page.detached = True
            if not page.num_users:
                self._queue.discard(page)
                self.num_idle_pages -= 1
                self._free(page)

    def check_integrity(self, num_holders: Mapping[int, int]) -> None:
        """Assert that idle pages, and these alone, can be evicted, leaves first.

        Args:
            num_holders: how many requests hold a page, by page id, of all that are held.
        """
        pages = self._pages
        assert all(count == 1 or page_id in pages for page_id, count in num_holders.items())
        assert self.num_idle_pages == sum(not page.num_users for page in pages.values())
        assert self.num_shared_pages == sum(page.num_sharers > 0 for page in pages.values())
        for page_id, page in pages.items():
            assert page.page_id == page_id
            assert 0 <= page.num_sharers <= page.num_users == num_holders.get(page_id, 0)
            assert (page in self._queue) == (not page.num_users and not page.children)
            if not page.detached:
                assert page.parent.children[page.tokens] is page
            if isinstance(page.parent, PrefixPage):
                assert page.parent.num_users >= page.num_sharers
                assert page.parent.num_users or not page.num_users

    def _retire(self, page: PrefixPage) -> None:
        if page.detached:
            self._free(page)
            return
        self.num_idle_pages += 1
        self._queue.rate(page, _PAGE_COST)
        if not page.children:
            self._queue.add(page, partial(self._evict, page))

    def _evict(self, page: PrefixPage) -> None:
        """Free an idle leaf, which may make a leaf of its parent."""
        self.num_idle_pages -= 1
        self._free(page)
        parent = page.parent
        del parent.children[page.tokens]
        if parent.children:
            return
        if isinstance(parent, PrefixRoot):
            del self._roots[parent.adapter_id]
        elif not parent.num_users:
            self._queue.add(parent, partial(self._evict, parent))

    def _free(self, page: PrefixPage) -> None:
        del self._pages[page.page_id]
        self._pool.free([page.page_id])
