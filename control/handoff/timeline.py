"""The last handoffs' timelines, in bounded memory; as MessagePack records, and for Perfetto.

A record is one MessagePack map: `handoff`, `side`, `peer`, `nbytes`, `error`, and `marks`, a list of
`[name, nanoseconds]` of the monotonic clock, which all processes of one host share, in their order:

    queued       the engine asked for the handoff
    placed       this side knows the other: decode is connected to it, prefill has its request
    asked        decode: the request goes out
    offered      prefill: the source blocks are known
    submitted    a write or a read (of some layers, perhaps) is given to the transfer engine
    on wire      its first piece sets out
    first byte   its first bytes were counted at this end
    gathered     its last piece is in staging; scattered: out of it
    written      it has ended; read: likewise
    free         the blocks are free
    ready        the handoff ended well; failed: badly

`on wire` to `scattered` come from the transport, so far as it has them: `cuda_ipc` tells the host
nothing before the end, and only what is staged is gathered and scattered.
"""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ..errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

MAX_MARKS = 64  # a handoff: one that goes out layer by layer has many writes


class Timeline(msgspec.Struct):
    """One handoff, seen from one side."""

    handoff: str
    side: str
    agent: str
    peer: str = ""
    nbytes: int = 0
    error: str = ""
    marks: list[tuple[str, int]] = []

    def mark(self, name: str) -> None:
        """Note that it got here, now."""
        if len(self.marks) < MAX_MARKS:
            self.marks.append((name, time.monotonic_ns()))

    def take(self, marks: Mapping[str, int]) -> None:
        """Note what others saw of it, which may be earlier than what is noted already."""
        self.marks.extend(list(marks.items())[: MAX_MARKS - len(self.marks)])


_encoder = msgspec.msgpack.Encoder()


class Recorder:
    """The last `capacity` timelines. One owner begins them; `write` and `encode` may come
    from any thread."""

    def __init__(self, capacity: int) -> None:
        self._timelines: deque[Timeline] = deque(maxlen=capacity)

    def begin(self, handoff: str, side: str, agent: str, peer: str, queued_s: float) -> Timeline:
        """Return a new timeline, which pushes out the oldest."""
        timeline = Timeline(handoff, side, agent, peer, marks=[("queued", int(queued_s * 1e9))])
        self._timelines.append(timeline)
        return timeline

    def encode(self) -> tuple[bytes, int]:
        """Return all timelines, oldest first, one MessagePack record after the other; and how
        many."""
        timelines = list(self._timelines)
        parts = []
        for timeline in timelines:  # whose owner may be adding to it: it is not sorted in its place
            marks = sorted(timeline.marks, key=lambda mark: mark[1])
            parts.append(_encoder.encode(msgspec.structs.replace(timeline, marks=marks)))
        return b"".join(parts), len(timelines)

    def write(self, path: Path | str) -> int:
        """Write all timelines, oldest first; return how many.

        Raises:
            ConfigError: the file cannot be written (the disk is full, say); the recorder goes on.
        """
        data, count = self.encode()
        try:
            Path(path).write_bytes(data)
        except OSError as error:
            raise ConfigError(f"the trace {path} cannot be written: {error.strerror}") from error
        return count


def read(path: Path) -> list[Timeline]:
    """Return the timelines of a file that `Recorder.write` wrote.

    Raises:
        ConfigError: it cannot be read, or is no trace.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"the trace {path} cannot be read: {error.strerror}") from error
    return decode(data, str(path))


def decode(data: bytes, source: str) -> list[Timeline]:
    """Return the timelines that `Recorder.encode` encoded; `source` is named in errors.

    Raises:
        ConfigError: it is no trace.
    """
    import msgpack  # type: ignore[import-untyped]  # late: engines write traces, and tools read them

    records = msgpack.Unpacker(max_buffer_size=0)
    records.feed(data)
    timelines, at = [], 0
    try:
        for record in records:
            timelines.append(msgspec.convert(record, Timeline))
            at = records.tell()
        if at < len(data):
            raise ValueError("it ends inside a record")  # noqa: TRY301
    except (msgspec.ValidationError, msgpack.UnpackException, ValueError, RecursionError) as error:
        why = str(error) or type(error).__name__
        raise ConfigError(f"{source} is no trace of kvferry, from byte {at}: {why}") from error
    return timelines


def chrome_trace(timelines: Iterable[Timeline]) -> dict[str, Any]:
    """Return the timelines as Chrome's trace events, which Perfetto reads: a process each agent."""
    events: list[dict[str, Any]] = []
    agents: dict[str, int] = {}
    for thread, timeline in enumerate(timelines):
        if timeline.agent not in agents:
            agents[timeline.agent] = len(agents) + 1
            name = {"name": timeline.agent}
            events.append(
                {"ph": "M", "name": "process_name", "pid": agents[timeline.agent], "args": name}
            )
        common = {"pid": agents[timeline.agent], "tid": thread, "cat": timeline.side}
        first, last = timeline.marks[0][1], timeline.marks[-1][1]
        about = {"peer": timeline.peer, "nbytes": timeline.nbytes, "error": timeline.error}
        events.append(
            common
            | {"ph": "X", "name": timeline.handoff, "ts": first / 1e3, "args": about}
            | {"dur": (last - first) / 1e3}
        )
        for (name_of, start), (_, stop) in zip(timeline.marks, timeline.marks[1:], strict=False):
            span = {"ph": "X", "name": name_of, "ts": start / 1e3, "dur": (stop - start) / 1e3}
            events.append(common | span)
    return {"traceEvents": events, "displayTimeUnit": "ms"}
