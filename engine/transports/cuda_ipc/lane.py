"""A lane: the stream on which one link's transfers of one GPU run, and who waits for it.

Waking a sleeping thread when a GPU gets somewhere costs hundreds of microseconds on some machines,
a spinning synchronize about five. So the lane's thread sleeps while nothing is in flight, and spins
in native code, without the interpreter lock, while something is. Waking it costs the caller 4 us
more than a look at its mailbox costs the thread: for a moment after each transfer it looks by itself.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import queue
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ....kernels.errors import LaunchError
from ...errors import BlockOutOfRange, DeviceError
from ...memory.cuda_driver import driver
from ...memory.cuda_events import AHEAD, Event, EventPool, enqueuer, held_streams, pool_of
from .scratch import FEWEST_WORDS, Flag, Scratch

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    from ....kernels.launch import LoadedCopy
    from ...errors import EngineError
    from ...memory.cuda_driver import Driver
    from ...transfer.block_ids import CheckedIds
    from ...transfer.ticket import Ticket
    from ...transfer.transfer import Transfer

log = logging.getLogger(__name__)

LINGER_S = 0.02  # after a transfer; a look takes some 5 us, so that is 5 % of a core for so long
LOOK_S = 50e-6  # what a thread asks for; an H200 machine sleeps 104 us
# Transfers in flight from which on the stream may be full: it takes about 1,024 launches, and a
# transfer of two kinds of pieces gives it six orders.
CROWDED = 64

_OTHER_CONTEXT = (201, 400)  # no valid context; a handle of another one

# Streams are used again, never destroyed: torch's allocators remember which streams used a tensor,
# and end the process when they ask one that is gone.
_idle_streams: dict[int, list[int]] = {}


class Launched(NamedTuple):
    """What must live until the kernels end, and the word in which they flag a bad block id."""

    keep: tuple[Any, ...]
    bad_ids: torch.Tensor | None = None


class _Flight(Event):
    """One transfer in the air, the event that its kernels end with, and what must live until then."""

    __slots__ = (
        "awaited",
        "bad_ids",
        "flag",
        "keep",
        "landed",
        "lane",
        "nbytes",
        "scratch",
        "transfer",
    )

    def __init__(self, lane: Lane, transfer: Transfer, pool: EventPool) -> None:
        self.lane = lane
        self.transfer = transfer
        self._idle = pool.idle  # as `Event` does: a call less
        self.handle = pool.take()
        self.nbytes = transfer.total_nbytes
        self.scratch: Scratch | None = None
        self.flag: Flag | None = None
        self.bad_ids: torch.Tensor | None = None
        self.keep: Any = None
        self.awaited = False  # a caller waits for it, awake, and will end it
        self.landed = False

    def spin(self) -> None:
        """On a caller's thread: waits for the kernels and ends the transfer."""
        self.awaited = True
        self.lane._land(self)

    def stream_wait(self, _ticket: Ticket, stream: torch.cuda.Stream) -> bool:
        """Let a stream wait for the kernels."""
        cuda = enqueuer()
        cuda.enter(stream.device_index)
        try:
            cuda.wait_event(stream.cuda_stream, self.handle)
        finally:
            cuda.leave()
        return True


class Lane:
    """One stream with a thread that ends transfers. Thread-safe.

    Attributes:
        device: index of the GPU that runs the kernels.
        stream: a stream of its own: nobody else's work delays it.
        state: the launch state of `kernels.signal`, one for the stream.
        watch: called by the lane's thread again and again while it is awake, and at every tick.
    """

    def __init__(self, device: int, name: str, watch: Callable[[], bool]) -> None:
        self.device = device
        self.watch = watch
        self._cuda = driver()
        idle = _idle_streams.get(device)
        self._raw_stream = idle.pop() if idle else self._cuda.new_stream(device)
        self.stream: torch.cuda.Stream = torch.cuda.ExternalStream(  # type: ignore[no-untyped-call]
            self._raw_stream, device=device
        )
        with self._cuda.beside_captures(), torch.cuda.stream(self.stream):
            self.state = torch.zeros(2, dtype=torch.int32, device=device)
        self._state_address = self.state.data_ptr()
        self._lock = threading.Lock()
        self._landed = threading.Condition(self._lock)
        self._in_flight = 0
        self._flights: collections.deque[_Flight] = collections.deque()
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._asleep = False
        self._free = {FEWEST_WORDS: Scratch.several(self.stream, AHEAD, FEWEST_WORDS)}
        self._flags = Flag.several(AHEAD)
        self._events = pool_of(device)
        self._mark = Event(self._events)
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"{name}-gpu{device}", daemon=True)
        self._thread.start()

    def warm(self) -> None:
        """Copy once to and fro, so that what the driver loads for that is there."""
        with self._lock, self._cuda.beside_captures(), torch.cuda.stream(self.stream):
            scratch = self._take(FEWEST_WORDS)
            scratch.upload(16, self._raw_stream, self._cuda.unlocked)
            self.stream.synchronize()
            self._free[scratch.num_words].append(scratch)

    def try_out(self, copies: tuple[LoadedCopy, ...], ids: CheckedIds, many: int) -> None:
        """Load and run all kernels that copies of up to `many` ids may need; may take seconds.

        Args:
            ids: of a block that does not exist, on the GPU.
        """
        flag = Flag.several(1)[0]
        for copy in copies:
            for dtype in (torch.int64, torch.int32):
                for count in (1, many):
                    copy.load(dtype, dtype, count)
        with self._lock, self._cuda.beside_captures():
            with self._cuda.current(self.device):
                torch.cuda.current_stream(self.device).synchronize()  # the ids are there
                for copy in copies:
                    copy.launch(
                        self._raw_stream,
                        ids.src.data_ptr(),
                        ids.src.dtype,
                        ids.dst.data_ptr(),
                        ids.dst.dtype,
                        ids.num_blocks,
                        state=self._state_address,
                        counter=0,
                        bad_ids=flag.address,
                    )
            self.stream.synchronize()

    def launch(
        self,
        transfer: Transfer,
        nbytes: int,
        rows: npt.NDArray[np.int64] | None,
        kernels: Callable[[torch.Tensor | None], Launched],
    ) -> None:
        """Enqueue a transfer's kernels; the lane's thread ends the transfer once they are done.

        Args:
            nbytes: that the kernels move.
            rows: ids or a table that they need on the GPU, `[n, m]`; they get it there.
            kernels: launches them on the current stream.
        """
        with self._lock:
            if self._closed or not transfer.begin():
                return
            try:
                flight = _Flight(self, transfer, self._events)
            except Exception as error:
                missing = error
            else:
                flight.nbytes = nbytes
                self._launch(flight, rows, kernels)
                self._in_the_air(flight)
                return
        self._not_begun(transfer, missing)

    def _launch(
        self,
        flight: _Flight,
        rows: npt.NDArray[np.int64] | None,
        kernels: Callable[[torch.Tensor | None], Launched],
    ) -> None:
        cuda, after = self._enqueuer(), flight.transfer.after
        try:
            uploaded = None
            with (
                cuda.beside_captures(),  # they may be loaded, and take memory
                torch.cuda.device(self.device),
                torch.cuda.stream(self.stream),
            ):
                # The rows depend on nothing, so they go ahead of what must be waited for.
                if rows is not None:
                    scratch = flight.scratch = self._take(rows.size)
                    scratch.words[: rows.size].reshape(rows.shape)[...] = rows
                    scratch.upload(rows.size, self._raw_stream, cuda)
                    uploaded = scratch.tensor[: rows.size].view(rows.shape)
                if after is not None:
                    cuda.wait_event(self._raw_stream, after.handle)
                flight.keep, flight.bad_ids = kernels(uploaded)
                cuda.record(flight.handle, self._raw_stream)
        except Exception as error:  # Triton and torch raise many kinds
            self._failed(flight, error)

    def copy_blocks(
        self,
        transfer: Transfer,
        copies: tuple[LoadedCopy, ...],
        ids: CheckedIds,
        stream: int | None,
        counter: int,
    ) -> None:
        """Enqueue a transfer of blocks, which takes the host one launch and little more.

        Args:
            ids: at least one.
            stream: raw; its work so far comes first. None: `transfer.after` does.
            counter: address of the peer's counter; 0 if nothing is counted.
        """
        with self._lock:
            if self._closed or not transfer.begin():
                return
            try:
                flight = _Flight(self, transfer, self._events)
                if not self._flags:
                    self._flags += Flag.several(AHEAD)
                if not ids.on_gpu:
                    count = ids.num_blocks
                    scratch = flight.scratch = self._take(2 * count)
                    scratch.words[:count] = ids.src
                    scratch.words[count : 2 * count] = ids.dst
            except Exception as error:
                missing = error
            else:
                flight.flag = self._flags.pop()
                flight.keep = ids
                try:
                    self._enqueue(flight, copies, ids, stream, counter)
                except (DeviceError, LaunchError) as error:
                    if error.code in _OTHER_CONTEXT:
                        self._enqueue_elsewhere(flight, copies, ids, stream, counter)
                    else:
                        self._failed(flight, error)
                except Exception as error:  # Triton and torch raise many kinds
                    self._failed(flight, error)
                self._in_the_air(flight)
                return
        self._not_begun(transfer, missing)

    def _enqueue(
        self,
        flight: _Flight,
        copies: tuple[LoadedCopy, ...],
        ids: CheckedIds,
        stream: int | None,
        counter: int,
    ) -> None:
        """What the driver is told for a transfer of blocks."""
        cuda, raw = self._enqueuer(), self._raw_stream
        flag, scratch = flight.flag, flight.scratch
        assert flag is not None
        mark = self._mark.handle
        if stream is not None:
            cuda.record(mark, stream)
        else:
            mark = flight.transfer.after.handle
        if scratch is None:
            src, dst = ids.src, ids.dst
            src_address, dst_address = src.data_ptr(), dst.data_ptr()
            src_dtype, dst_dtype = src.dtype, dst.dtype
        else:
            # Ids depend on nothing, so they go ahead of what must be waited for.
            scratch.upload(2 * ids.num_blocks, raw, cuda)
            src_address = scratch.address
            dst_address = src_address + 8 * ids.num_blocks
            src_dtype = dst_dtype = torch.int64
        cuda.wait_event(raw, mark)
        for copy in copies:
            copy.launch(
                raw,
                src_address,
                src_dtype,
                dst_address,
                dst_dtype,
                ids.num_blocks,
                self._state_address,
                counter,
                flag.address,
            )
        cuda.record(flight.handle, raw)

    def _enqueue_elsewhere(self, flight: _Flight, *arguments: Any) -> None:
        """On a thread whose current context is that of another GPU, or which has none yet. Nothing
        was launched: a thread finds out when it tries, which saves the others the question."""
        try:
            self._cuda.enter(self.device)
            try:
                self._enqueue(flight, *arguments)
            finally:
                self._cuda.leave()
        except Exception as error:  # as in `copy_blocks`
            self._failed(flight, error)

    def ring(self) -> None:
        """Wake the lane's thread if it sleeps."""
        if self._asleep:
            self._bell.put(None)

    def close(self) -> None:
        """Wait until nothing is in flight and end the thread. Not on the lane's own thread."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._bell.put(None)
        self._thread.join()
        with self._lock:
            self._landed.wait_for(lambda: not self._in_flight)
        _idle_streams.setdefault(self.device, []).append(self._raw_stream)

    def _enqueuer(self) -> Driver:
        """Return the driver for what this stream is given, and the one before it: it lets go of the
        interpreter lock where it may have to wait for room."""
        if self._in_flight < CROWDED and not held_streams.count:
            return self._cuda
        return self._cuda.unlocked

    def _not_begun(self, transfer: Transfer, error: Exception) -> None:
        """What a transfer needs on its way was not to be had, and nothing was launched."""
        _stop(transfer, DeviceError, f"GPU {self.device} has nothing to begin with: {error}")
        transfer.end(0)

    def _failed(self, flight: _Flight, error: Exception) -> None:
        """What was launched before the failure is waited for all the same."""
        flight.nbytes = 0
        cuda = self._enqueuer()
        with contextlib.suppress(DeviceError), cuda.current(self.device):
            cuda.record(flight.handle, self._raw_stream)
        _stop(flight.transfer, DeviceError, f"launching on GPU {self.device} failed: {error}")

    def _in_the_air(self, flight: _Flight) -> None:
        """Last of all: a thread that is woken wants the interpreter lock."""
        ticket = flight.transfer.ticket
        ticket._spin = flight.spin
        ticket._stream_wait = flight.stream_wait
        self._in_flight += 1
        self._flights.append(flight)
        if self._asleep:
            self._bell.put(None)

    def _take(self, num_words: int) -> Scratch:
        size = max(FEWEST_WORDS, 1 << (num_words - 1).bit_length())
        free = self._free.setdefault(size, [])
        if not free:
            free += Scratch.several(self.stream, max(1, AHEAD * FEWEST_WORDS // size), size)
        return free.pop()

    def _work(self) -> None:
        torch.cuda.set_device(self.device)
        self._cuda.stay_out_of_captures()
        linger_until_s = 0.0
        while True:
            try:
                flight = self._flights.popleft()
            except IndexError:
                if self._closed:
                    return
                if self._looked_around():
                    linger_until_s = time.monotonic() + LINGER_S
                if time.monotonic() < linger_until_s:
                    time.sleep(LOOK_S)
                    continue
                self._asleep = True
                if not self._flights and not self._closed:  # again, now that callers ring
                    self._bell.get()
                self._asleep = False
                continue
            linger_until_s = time.monotonic() + LINGER_S
            if flight.awaited:
                continue  # two threads that wake at once would fight for the interpreter lock
            try:
                self._land(flight)
            except Exception:
                log.exception("kvferry: ending a GPU transfer failed; please report this")

    def _looked_around(self) -> bool:
        try:
            return self.watch()
        except Exception:
            log.exception("kvferry: watching a GPU failed; please report this")
            return False

    def _met_bad_ids(self, flight: _Flight) -> bool:
        if flight.flag is not None:
            return flight.flag.take_down()
        return flight.bad_ids is not None and bool(flight.bad_ids.item())

    def _land(self, flight: _Flight) -> None:
        """Wait for a transfer's kernels and end it, on whichever thread is the first to see it:
        a caller that waits need not be woken by the lane's thread."""
        transfer, moved = flight.transfer, flight.nbytes
        failure = None
        try:
            self._cuda.synchronize_event(flight.handle)
        except DeviceError as error:
            failure = error
        with self._lock:
            if flight.landed:
                return
            flight.landed = True
        if failure is not None:
            moved = 0
            _stop(transfer, DeviceError, f"GPU {self.device} failed: {failure.message}")
        elif self._met_bad_ids(flight):
            moved = 0
            _stop(
                transfer,
                BlockOutOfRange,
                "a block id on the GPU is outside the cache: its block was not moved, and nothing "
                "was counted",
            )
        try:
            transfer.end(moved)
        finally:
            with self._lock:
                if flight.scratch is not None:
                    self._free[flight.scratch.num_words].append(flight.scratch)
                if flight.flag is not None:
                    self._flags.append(flight.flag)
                flight.keep = flight.bad_ids = None
                self._in_flight -= 1
                if not self._in_flight:
                    self._landed.notify_all()


def _stop(transfer: Transfer, kind: type[EngineError], why: str) -> None:
    ticket = transfer.ticket
    transfer.stop(kind(why, operation=ticket.operation, peer=ticket.peer, imm=transfer.imm))
