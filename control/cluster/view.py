"""A watcher's picture of the cluster: a snapshot, and the changes since.

Pure. Publications may come before the snapshot, twice, or never: changes are numbered, and a gap
(or another life of the daemon) makes the picture stale until a new snapshot is heard.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from .messages import Changes, Loads, Snapshot, Tick

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .messages import Load, Member

MAX_HELD = 1024  # changes that wait for a snapshot; with more, the snapshot is asked for again


class View:
    """Members and loads as last heard. Not thread-safe: one owner.

    Attributes:
        members: by name. Replaced, never changed, so another thread may read it.
        loads: the last loads heard, by name.
        stale: whether a snapshot is needed. The members are then the last that were known.
        epoch, sequence: where the picture stands.
    """

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self.loads: dict[str, Load] = {}
        self.stale = True
        self.epoch = 0
        self.sequence = 0
        self._held: list[Changes] = []

    def hear(self, message: Snapshot | Changes | Tick | Loads) -> bool:
        """Take one message; return whether the members changed."""
        return self._heard[type(message)](self, message)

    def _tick(self, tick: Tick) -> bool:
        if tick.epoch != self.epoch or tick.sequence > self.sequence:
            self.stale = True
        return False

    def _load(self, message: Loads) -> bool:
        known = {name: load for name, load in self.loads.items() if name in self.members}
        self.loads = known | message.loads
        return False

    def _take(self, snapshot: Snapshot) -> bool:
        if snapshot.epoch == self.epoch and snapshot.sequence < self.sequence:
            return False  # an answer that was overtaken
        before = self.members
        self.members = {member.name: member for member in snapshot.members}
        self.loads = dict(snapshot.loads) or self.loads
        self.epoch, self.sequence, self.stale = snapshot.epoch, snapshot.sequence, False
        held, self._held = self._held, []
        for changes in held:
            if changes.epoch == snapshot.epoch:  # those of another daemon, or life, are no gap
                self._change(changes)
        return self.members != before

    def _change(self, changes: Changes) -> bool:
        if not self.stale and changes.epoch == self.epoch:
            if changes.sequence <= self.sequence:
                return False
            if changes.sequence == self.sequence + 1:
                self._apply(changes)
                return True
        self.stale = True
        if len(self._held) < MAX_HELD:
            self._held.append(changes)
        else:
            self._held.clear()
        return False

    def _apply(self, changes: Changes) -> None:
        members = dict(self.members)
        for gone in changes.gone:
            member = members.get(gone.name)
            if member is not None and member.generation <= gone.generation:
                del members[gone.name]
        for member in changes.members:
            members[member.name] = member
        self.members = members
        self.sequence = changes.sequence

    _heard: ClassVar[Mapping[type, Callable[..., bool]]] = {
        Snapshot: _take,
        Changes: _change,
        Tick: _tick,
        Loads: _load,
    }
