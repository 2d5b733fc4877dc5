"""Who owns which page of the KV cache. The storage is the engine's; here are only page numbers.

A sequence gets all the pages that it can ever need at once, or none: a request that was admitted never stops for want of memory.
free + used == total always; `check_idle` adds that nothing is used when nothing runs.
"""

from __future__ import annotations


class PageTable:
    """Pages 0 .. num_pages - 1 of page_size tokens each. Touched by the worker's thread alone."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free: list[int] = []  # a stack: the page freed last, still warm, is taken first
        self._used: set[int] = set()
        self.clear()

    @property
    def free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages that running sequences own."""
        return len(self._used)

    @property
    def usage(self) -> float:
        """The used part, 0 to 1."""
        return len(self._used) / self.num_pages

    def pages_for(self, tokens: int) -> int:
        """How many pages hold that many tokens."""
        return -(-tokens // self.page_size)

    def allocate(self, tokens: int) -> tuple[int, ...] | None:
        """Pages for `tokens` tokens, in order; None, and nothing taken, when there are too few free."""
        count = self.pages_for(tokens)
        if count > len(self._free):
            return None
        pages = tuple(self._free.pop() for _ in range(count))
        self._used.update(pages)
        return pages

    def release(self, pages: tuple[int, ...]) -> None:
        """Give pages back. Each of them must be in use."""
        assert self._used.issuperset(pages), "a page was freed twice"
        self._used.difference_update(pages)
        self._free.extend(reversed(pages))

    def clear(self) -> None:
        """Nobody owns any page."""
        self._free[:] = range(self.num_pages - 1, -1, -1)
        self._used.clear()

    def check_idle(self) -> None:
        """With no sequence running, every page is free, each exactly once."""
        assert not self._used, f"{len(self._used)} pages leaked"
        assert len(set(self._free)) == len(self._free) == self.num_pages, "the free list lost or doubled pages"
