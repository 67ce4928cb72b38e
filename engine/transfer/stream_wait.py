"""Words of pinned host memory that CUDA streams wait for and host threads write."""

from __future__ import annotations

import ctypes
import threading
from typing import TYPE_CHECKING, Any

from ..memory.cuda_driver import driver

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

_PAGE_WORDS = 512
_WORD_NBYTES = 8

_lock = threading.Lock()
_pages: list[Any] = []  # pinned tensors; never freed, since a stream may still look at them
_free: list[ctypes.c_int64] = []


def wait_for_host(stream: torch.cuda.Stream) -> Callable[[], None]:
    """Let a stream wait for a word of host memory; return what writes it, to be called once.

    A word only grows, so it can serve again as soon as it is written: streams that have not
    looked at it yet find what they wait for, or more.
    """
    word = _take()
    value = word.value + 1
    driver().wait_value(stream.device_index, stream.cuda_stream, ctypes.addressof(word), value)

    def write() -> None:
        word.value = value
        with _lock:
            _free.append(word)

    return write


def _take() -> ctypes.c_int64:
    with _lock:
        if not _free:
            import torch

            page = torch.zeros(_PAGE_WORDS, dtype=torch.int64, pin_memory=True)
            _pages.append(page)
            base = page.data_ptr()
            _free.extend(
                ctypes.c_int64.from_address(base + i * _WORD_NBYTES) for i in range(_PAGE_WORDS)
            )
        return _free.pop()
