"""What a child of fork() has of its parent's engines: nothing that it could use.

The descriptors of a child are its parent's sockets, events and devices: what it did with one it would
do to its parent, and what it holds open stays open when its parent dies. So they are taken from it
before any of its code runs, and what it has inherited says so when it is used, whatever a thread of the
parent's was doing when it forked: no lock is taken in a child that was there before.
"""

from __future__ import annotations

import ctypes
import logging
import os
import weakref
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from ..errors import ForkedProcess

if TYPE_CHECKING:
    from collections.abc import Iterable

log = logging.getLogger(__name__)

generation = 0
"""How many forks lie between this process and the one that imported this module."""


class Owner(Protocol):
    """Who has descriptors, or locks, that are of no use in a child."""

    def forked(self) -> Iterable[int]:
        """Become unusable, in a child, without taking a lock; return the descriptors it has."""


_owners: weakref.WeakSet[Any] = weakref.WeakSet()
# What a child has inherited: never freed there, since that would end what its parent uses.
_inherited: list[Any] = []


def disown_in_child(owner: Owner) -> None:
    """See to it that no child of this process has what `owner` has."""
    _owners.add(owner)


def check(made: int, operation: str = "") -> None:
    """Check that this process made what it uses.

    Args:
        made: the generation at that time.

    Raises:
        ForkedProcess: a parent of this process did.
    """
    if made != generation:
        raise error(operation)


def error(operation: str = "") -> ForkedProcess:
    """Return the error of a child that uses what its parent has made."""
    return ForkedProcess(
        "this belongs to the process that forked this one, and works there alone: make an engine or "
        "agent of this process's own, or start the process by spawn",
        operation=operation,
    )


class Inherited:
    """Takes a part's place in a child: whatever is asked of it raises `ForkedProcess`."""

    def __getattr__(self, name: str) -> NoReturn:
        raise error()

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise error()


def _begin_child() -> None:
    """Take from a child what it has inherited. The parent's other threads are not there."""
    global generation
    generation += 1
    owners = list(_owners)
    _owners.clear()
    _inherited.extend((owner, dict(vars(owner))) for owner in owners)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_inherited))  # not at its end either
    fds: list[int] = []
    for owner in owners:
        try:
            fds += owner.forked()
        except Exception:
            log.exception("kvferry: a child keeps what %r has; please report this", owner)
    try:
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # no descriptor is free: then they are closed, which nobody here does again
        for fd in fds:
            os.close(fd)
        return
    for fd in fds:
        os.dup2(nothing, fd, inheritable=False)
    os.close(nothing)


os.register_at_fork(after_in_child=_begin_child)
