"""A write of blocks that a CUDA graph repeats: what changes from time to time lies on the GPU."""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING

import torch

from ....kernels.launch import LOG_ROWS, GraphWords
from ...errors import Cancelled, DeviceError, EngineError, PlanError
from ...memory.cuda_driver import driver
from ...wire.messages import Arrived

if TYPE_CHECKING:
    from ...transfer.transfer import Transfer
    from ..base import PathHost
    from .plan import CudaPlan

log = logging.getLogger(__name__)

_SEQUENCE_BITS = (31, 24)  # of the number of a launch, in the two words of a row

# What the graphs of launched writes read and write whenever they are replayed. Nothing tells when a
# graph is gone, and one that is replayed after `close` must still find its gate closed.
_in_graphs: list[tuple[object, ...]] = []


class GraphWrite:
    """A write of blocks that CUDA graphs repeat. Made by `Link.graph_write`, before the capture.

    Launch it where the blocks have been computed, while a graph is being captured::

        write = link.graph_write(plan, src_ids, dst_ids, order)
        with torch.cuda.graph(graph):
            ...                        # the forward pass
            write.launch()
        for request in requests:       # the graph takes the host 2 to 3 us
            src_ids[:n], dst_ids[:n] = ...
            order.copy_(...)           # imm, n
            graph.replay()

    Rules:

    - It reads, when the graph gets there, the first `order[1]` ids of each list, and counts their
      bytes under imm `order[0]` at the peer (0: under none). All three tensors are the caller's: fill
      them on the stream that replays, or in the graph itself.
    - Every replay takes an imm of its own, which the peer expects, as with `write_blocks`.
    - An id out of range is neither read nor written, a number of ids below 0 or above the length of
      the lists moves nothing. Such a replay counts nothing: its imm is aborted at the peer, and
      `failures` grows.
    - Source blocks may be reused by what comes behind the launch on its stream.
    - The peer's streams (`Ticket.wait_on`) and threads that wait awake (`Ticket.wait(spin=True)`) see
      the bytes at once. Its other waiters are told by this process's host, which looks at what
      replays have done: after 0.1 ms while they follow each other closely, else after 50 ms.
    - Launches of one `GraphWrite` may not overlap: one place in one graph, or several in a row on one
      stream. For layer-wise writes make one for each group of layers.
    - Launch it once, outside any graph, to load its kernel; `Link.graph_write` has done so.
    - It ends with `close`, with its link, or when a region it touches is taken back: from then on
      replays move nothing, and those that run have ended. It keeps the local cache in use until then.
    - What a launched one needs on the GPU, and 256 KiB of pinned memory, stay for the life of the
      process: a graph may be replayed long after. Make few, and keep them.

    Thread-safe but for `launch`.

    Attributes:
        failures: replays that were refused by the kernel, seen so far.
        replays: all that were seen so far.
    """

    def __init__(
        self,
        link: PathHost,
        transfer: Transfer,
        compiled: CudaPlan,
        ids: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        device: int,
    ) -> None:
        if len(compiled.copies) != 1:
            raise PlanError(
                f"the blocks of this plan are {len(compiled.copies)} kinds of pieces, a graph write "
                "moves one: give it the layers one group at a time",
                operation="graph_write",
            )
        self.failures = 0
        self.replays = 0
        self._link = link
        self._transfer = transfer
        self._src_ids, self._dst_ids, self._order = ids
        self._device = device
        self._counters, self._counted = compiled.counters, compiled.counted
        self._copy = compiled.copies[0]
        self._lock = threading.Lock()
        with driver().beside_captures(), torch.cuda.device(device):
            # Finished programs; the gate; launches so far.
            self._words = torch.zeros(3, dtype=torch.int64, device=device)
            torch.cuda.current_stream(device).synchronize()
            self._rows = torch.zeros((LOG_ROWS, 2), dtype=torch.int64, pin_memory=True)
        self._log = self._rows.numpy().view("uint64")
        self._addresses = GraphWords(
            order=self._order.data_ptr(),
            gate=self._words.data_ptr() + 8,
            log=self._rows.data_ptr(),
        )
        self._copy.load(self._src_ids.dtype, self._dst_ids.dtype, len(self._src_ids), graph=True)
        self._launched = False
        self._closing = False
        self._closed = threading.Event()
        transfer.on_stop = self._close_soon
        if not transfer.begin():
            raise link.down_error("graph_write")

    def __enter__(self) -> GraphWrite:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether it moves nothing any more."""
        return self._closed.is_set()

    @property
    def error(self) -> EngineError | None:
        """Why it ended, if it was not closed by `close`."""
        error = self._transfer.stopped
        return None if isinstance(error, Cancelled) else error

    def launch(self, stream: torch.cuda.Stream | None = None) -> None:
        """Launch on a stream, the current one if None; usually while it is being captured.

        Raises:
            EngineError: it has ended.
        """
        if self._closing:
            raise self._transfer.stopped or Cancelled("closed", operation="graph_write")
        raw = (
            torch._C._cuda_getCurrentRawStream(self._device)
            if stream is None
            else stream.cuda_stream
        )
        if not self._launched:
            self._launched = True
            _in_graphs.append((self._words, self._rows, self._copy))
        with driver().current(self._device):
            self._copy.launch_for_graph(
                raw,
                self._src_ids.data_ptr(),
                self._src_ids.dtype,
                self._dst_ids.data_ptr(),
                self._dst_ids.dtype,
                len(self._src_ids),
                state=self._words.data_ptr(),
                counters=self._counters,
                words=self._addresses,
            )

    def poll(self) -> bool:
        """Tell the peer's host what replays have moved since the last time; whether there was any.

        Called often by the engine; call it yourself to hurry.
        """
        seen = False
        with self._lock:
            while True:
                number = self.replays + 1
                words = [int(word) for word in self._log[number % LOG_ROWS]]
                numbers = (words[0] >> 33, words[1] >> 40)
                if not all(
                    have == number % (1 << bits)
                    for have, bits in zip(numbers, _SEQUENCE_BITS, strict=True)
                ):
                    self._check_overrun(number, numbers)
                    return seen
                self.replays = number
                seen = True
                self._report(words[0] & 0xFFFFFFFF, words[1] & 0xFFFFFFFFFF, words[0] >> 32 & 1)

    def close(self) -> None:
        """End it: replays move nothing from now on, and those that run have ended on return.

        Waits for everything that was given to the GPU. Safe to call again.
        """
        self._transfer.stop(Cancelled("this graph write was closed", operation="graph_write"))
        self._shut()
        self._closed.wait()

    def _close_soon(self) -> None:
        """It was stopped, perhaps on the progress thread, which must not wait."""
        threading.Thread(target=self._shut, name="kvferry-graph-write", daemon=True).start()

    def _shut(self) -> None:
        with self._lock:
            if self._closing:
                return
            self._closing = True
        try:
            cuda = driver()
            stream = cuda.new_stream(self._device)
            cuda.write_value(self._device, stream, self._addresses.gate, 1)
            cuda.synchronize(self._device)  # a replay that passed the gate has ended
            cuda.destroy_stream(self._device, stream)
        except DeviceError:
            log.warning("kvferry: GPU %d failed while a graph write was closed", self._device)
        with contextlib.suppress(EngineError):
            self.poll()
        self._closed.set()
        self._transfer.end(0)

    def _report(self, imm: int, num_ids: int, failed: int) -> None:
        if failed:
            self.failures += 1
            if imm:
                self._link.abort(imm, "a block id or their number was out of range")
        elif imm:
            nbytes = num_ids * self._copy.id_nbytes
            there = nbytes if self._counted else 0
            self._link.send(Arrived(imm, nbytes, 1, device_nbytes=there))

    def _check_overrun(self, number: int, numbers: tuple[int, int]) -> None:
        """Rows that were overwritten before anybody looked: the peer cannot be told any more."""
        ahead = (numbers[0] - number) % (1 << _SEQUENCE_BITS[0])
        if 0 < ahead < 1 << 30:
            self._link.fail(
                DeviceError(
                    f"more than {LOG_ROWS} replays went unseen: this process was asleep",
                    operation="graph_write",
                )
            )
