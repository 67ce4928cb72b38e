"""What a lane takes for each transfer and gets back: pinned words and flags."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from ...memory.cuda_driver import driver

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ...memory.cuda_driver import Driver

FEWEST_WORDS = 1 << 10
AHEAD = 64  # scratches made at once: allocating waits for the GPU, which may be waiting for us


class Scratch:
    """Pinned words here and as many on the GPU: how ids and tables get there without a wait.

    The host half belongs to its user until the transfer that took it has ended.
    """

    def __init__(self, pinned: torch.Tensor, device: torch.Tensor) -> None:
        self.num_words = pinned.numel()
        self.words: npt.NDArray[np.int64] = pinned.numpy()
        self.tensor = device
        self.address = device.data_ptr()
        self._source = pinned.data_ptr()

    @classmethod
    def several(cls, stream: torch.cuda.Stream, count: int, num_words: int) -> list[Scratch]:
        """Several of one size for one stream, out of one allocation on each side.

        torch's allocator hands out what the stream that asks has freed but not finished with: asked
        on another one, its pending kernels would write over the ids that this stream uploads.
        """
        with driver().beside_captures(), torch.cuda.stream(stream):
            pinned = torch.empty((count, num_words), dtype=torch.int64, pin_memory=True)
            there = torch.empty((count, num_words), dtype=torch.int64, device=stream.device)
        return [cls(*halves) for halves in zip(pinned, there, strict=True)]

    def upload(self, num_words: int, stream: int, cuda: Driver) -> None:
        """Its first words to the GPU, in the order of a raw stream."""
        cuda.upload(self.address, self._source, num_words * 8, stream)


class Flag:
    """A word of pinned memory that a kernel sets when it meets a block id out of range."""

    __slots__ = ("_page", "_word", "address")

    def __init__(self, page: torch.Tensor, position: int) -> None:
        self._page = page  # kept alive
        self.address = page.data_ptr() + 4 * position
        self._word = ctypes.c_int32.from_address(self.address)

    @classmethod
    def several(cls, count: int) -> list[Flag]:
        """Several, all down."""
        with driver().beside_captures():
            page = torch.zeros(count, dtype=torch.int32, pin_memory=True)
        return [cls(page, position) for position in range(count)]

    def take_down(self) -> bool:
        """Return whether it was set; it is down afterwards."""
        word = self._word
        if not word.value:
            return False
        word.value = 0
        return True
