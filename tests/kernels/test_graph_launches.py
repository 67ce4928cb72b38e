"""Launches that a CUDA graph repeats: writes of one plan share what they hand to the driver."""

from __future__ import annotations

import threading
from typing import Any

import torch

from kvferry.kernels.launch import GraphWords, LoadedCopy
from kvferry.kernels.paged import Geometry, PagedCache

PATIENCE_S = 20.0


class Words(list[int]):
    """Says when somebody writes while a launch has them."""

    def __init__(self) -> None:
        super().__init__([0] * 16)
        self.handed_over = False
        self.overwritten = threading.Event()

    def __setitem__(self, at: Any, value: Any) -> None:
        super().__setitem__(at, value)
        if self.handed_over:
            self.overwritten.set()


class Kernel:
    """The driver reads the first launch's arguments late, when another thread had time to write."""

    def __init__(self) -> None:
        self.words = Words()
        self.begun = threading.Event()
        self.taken: dict[int, list[int]] = {}

    def launch(self, stream: int, _x: int, _y: int) -> None:
        if not self.begun.is_set():
            self.words.handed_over = True
            self.begun.set()
            self.words.overwritten.wait(0.2)
            self.words.handed_over = False
        self.taken[stream] = list(self.words)


def test_two_threads_launch_writes_of_one_plan_each_with_its_own_arguments(
    monkeypatch: Any,
) -> None:
    geometry = Geometry(
        num_blocks=4,
        outer=1,
        inner=1,
        dim_nbytes=64,
        block_stride_nbytes=64,
        outer_stride_nbytes=64,
        inner_stride_nbytes=64,
        alignment_nbytes=1,
    )
    src, dst = (
        PagedCache.from_addresses([1 << 20], geometry, torch.device("cpu")) for _ in range(2)
    )
    copy = LoadedCopy(src, dst, max_programs=None, num_slots=8)
    kernel = Kernel()

    monkeypatch.setattr(copy, "_kernel", lambda *_: (kernel, 1, 1))

    def launch(stream: int) -> None:
        copy.launch_for_graph(
            stream,
            stream,
            torch.int64,
            stream,
            torch.int64,
            stream,
            state=stream,
            counters=stream,
            words=GraphWords(stream, stream, stream),
        )

    first = threading.Thread(target=launch, args=(1000,))
    first.start()
    assert kernel.begun.wait(PATIENCE_S)
    second = threading.Thread(target=launch, args=(2000,))
    second.start()
    for thread in (first, second):
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    for stream in (1000, 2000):
        taken = kernel.taken[stream]
        assert [taken[at] for at in (1, 3, 4, 5, 6, 7, 8, 11)] == [stream] * 8
