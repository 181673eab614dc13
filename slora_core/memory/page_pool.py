"""Bookkeeping of the unified pool: which page is free, KV, or an adapter's.

Knows page ids and owners, no tensors and no requests. The scheduler takes KV pages from it and
`adapters.residency` takes adapter pages; both give them back here.
"""

from collections.abc import Iterable, Sequence
from enum import IntEnum


def pages_for(num_tokens: int, page_tokens: int) -> int:
    """KV pages that `num_tokens` tokens take."""
    return -(-num_tokens // page_tokens)


class PageOwner(IntEnum):
    FREE = 0
    KV = 1
    ADAPTER = 2


class PagePool:
    """A free list of `num_pages` page ids with one owner a page.

    Adjacent ids are handed out together where the free list allows it, so that copies merge.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}; the pool needs at least 1")
        self._num_pages = num_pages
        self._owners = [PageOwner.FREE] * num_pages
        # Popped from the end: ids come out ascending from a fresh pool.
        self._free = list(range(num_pages - 1, -1, -1))
        self._counts = {PageOwner.KV: 0, PageOwner.ADAPTER: 0}

    @property
    def num_pages(self) -> int:
        return self._num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def num_owned(self, owner: PageOwner) -> int:
        return self.num_free if owner is PageOwner.FREE else self._counts[owner]

    def can_allocate(self, count: int) -> bool:
        return count <= len(self._free)

    def allocate(self, count: int, owner: PageOwner) -> list[int]:
        """Take `count` free pages for KV or an adapter; the caller made sure they are there."""
        assert owner is not PageOwner.FREE
        assert self.can_allocate(count), f"{count} pages wanted, {len(self._free)} free"
        if count == 0:
            return []
        page_ids = self._free[-count:][::-1]
        del self._free[-count:]
        for page_id in page_ids:
            self._owners[page_id] = owner
        self._counts[owner] += count
        return page_ids

    def free(self, page_ids: Sequence[int]) -> None:
        """Give pages back; freeing a page twice is a defect and asserts."""
        # The list is popped from its end: reversed, they come out again in this order.
        for page_id in reversed(page_ids):
            owner = self._owners[page_id]
            assert owner is not PageOwner.FREE, f"page {page_id} is free already"
            self._owners[page_id] = PageOwner.FREE
            self._counts[owner] -= 1
            self._free.append(page_id)

    def check_integrity(self, kv_pages: Iterable[int], adapter_pages: Iterable[int]) -> None:
        """Assert free + KV + adapter == total and that no page has two owners.

        Args:
            kv_pages: every page id held by a request's block table.
            adapter_pages: every page id held by a resident adapter.
        """
        kv, adapter = list(kv_pages), list(adapter_pages)
        seen = sorted(self._free + kv + adapter)
        assert seen == list(range(self._num_pages)), (
            f"{len(self._free)} free + {len(kv)} KV + {len(adapter)} adapter pages are not the "
            f"{self._num_pages} pages of the pool, each once"
        )
        for owner, pages in ((PageOwner.KV, kv), (PageOwner.ADAPTER, adapter)):
            assert all(self._owners[page_id] is owner for page_id in pages)
            assert self._counts[owner] == len(pages)
