"""Words of pinned host memory that CUDA streams wait for and host threads write."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from ..memory.cuda_driver import driver
from ..memory.cuda_events import held_streams

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

_PAGE_WORDS = 1 << 13  # waits that may be outstanding before CUDA is asked for memory again: 64 KiB
_WORD_NBYTES = 8

# Lists that any thread appends to and pops from, without a lock.
_pages: list[Any] = []  # pinned tensors; never freed, since a stream may still look at them
_free: list[ctypes.c_int64] = []


def wait_for_host(stream: torch.cuda.Stream) -> Callable[[], None]:
    """Let a stream wait for a word of host memory; return what writes it, to be called once.

    A word only grows, so it can serve again as soon as it is written: streams that have not
    looked at it yet find what they wait for, or more.
    """
    word = _take()
    value = word.value + 1
    held_streams.add(1)
    try:
        driver().wait_value(stream.device_index, stream.cuda_stream, ctypes.addressof(word), value)
    except BaseException:
        held_streams.add(-1)
        _free.append(word)
        raise

    def write() -> None:
        word.value = value
        _free.append(word)
        held_streams.add(-1)

    return write


def _take() -> ctypes.c_int64:
    """Return a word that nobody waits for.

    CUDA may give memory only when streams have got somewhere, and those that wait for words get there
    by `write`: nothing is held meanwhile that a writing thread needs.
    """
    try:
        return _free.pop()
    except IndexError:
        pass
    import torch

    with driver().beside_captures():
        page = torch.zeros(_PAGE_WORDS, dtype=torch.int64, pin_memory=True)
    _pages.append(page)
    base = page.data_ptr()
    words = [ctypes.c_int64.from_address(base + i * _WORD_NBYTES) for i in range(_PAGE_WORDS)]
    word = words.pop()
    _free.extend(words)
    return word
