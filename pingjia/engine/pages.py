"""Who owns which KV page. Pure bookkeeping of page numbers; the tensors are in kv.py.

A page is free, owned by one or more sequences, or idle: owned by none but kept under its content key until its place
is needed (least recently used first). A full page is never written again, so sharing it needs no copy. The page in
which a prompt ends has a key for its beginning too, its tail: whoever finds it copies the page and writes on.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


def page_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Key of a page: its own tokens and, through `parent`, everything before them.

    Cryptographic on purpose: users share the cache, and nobody may craft a prompt that hits another's pages.
    """
    return hashlib.sha256(parent + array("q", tokens).tobytes()).digest()


class PageAllocator:
    """Hands out pages 0..num_pages-1, counts their owners, finds full pages again by key."""

    def __init__(self, num_pages: int, *, reuse: bool = True) -> None:
        self.num_pages = num_pages
        self.reuse = reuse
        self._owners = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._tail_of: dict[int, bytes] = {}
        self._page_of_tail: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can hand out, idle ones included."""
        return len(self._free) + len(self._idle)

    @property
    def num_owned(self) -> int:
        return self.num_pages - self.num_free

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """Pages of the longest run of leading keys that are still there. Does not take them."""
        found = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def take(self, pages: Iterable[int]) -> None:
        """Add one owner to each of these matched pages."""
        for page in pages:
            if self._owners[page] == 0:
                del self._idle[page]
            self._owners[page] += 1

    def allocate(self, count: int) -> list[int]:
        """`count` pages with one owner each and unknown content; at most `num_free`."""
        assert count <= self.num_free, f"{count} pages wanted, {self.num_free} free"
        return [self._allocate_one() for _ in range(count)]

    def _allocate_one(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            self._unregister(page)
        self._owners[page] = 1
        return page

    def register(self, page: int, key: bytes) -> None:
        """Make a page that has just become full findable. An equal page registered before stays the one found."""
        if self.reuse and key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def register_tail(self, page: int, key: bytes) -> None:
        """Make the page findable in which a prompt ends; what is in it now stays, more may be written behind it."""
        if self.reuse and key not in self._page_of_tail and page not in self._tail_of:
            self._page_of_tail[key] = page
            self._tail_of[page] = key

    def find_tail(self, key: bytes) -> int | None:
        """The page to copy for this end of a prompt; good until pages of this step are written."""
        return self._page_of_tail.get(key)

    def forget(self, pages: Iterable[int]) -> None:
        """Make owned pages unfindable: what they hold is no good."""
        for page in pages:
            assert self._owners[page] > 0, f"page {page} is not owned"
            self._unregister(page)

    def _unregister(self, page: int) -> None:
        for keys, pages in ((self._key_of, self._page_of), (self._tail_of, self._page_of_tail)):
            if page in keys:
                del pages[keys.pop(page)]

    def release(self, pages: Sequence[int]) -> None:
        """Drop one owner of each. The end of a sequence goes first, so that beginnings stay findable longest."""
        for page in reversed(pages):
            assert self._owners[page] > 0, f"page {page} released twice"
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._make_available(page)

    def _make_available(self, page: int) -> None:
        if page in self._key_of or page in self._tail_of:
            self._idle[page] = None
        else:
            self._free.append(page)
