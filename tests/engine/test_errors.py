"""The error tree: complete, drawn as it is, with its context, and nothing of a lower level."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from kvferry.engine import errors
from kvferry.engine.errors import EngineError, LinkError, PeerLost

CLASSES: list[type[EngineError]] = sorted(
    (c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, EngineError)),
    key=lambda c: c.__name__,
)


def test_the_diagram_is_the_tree() -> None:
    assert errors.__doc__ is not None
    drawn: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    for line in errors.__doc__.splitlines():
        match = re.match(r"^([ │├└─]*)([A-Z]\w+)(?:\s{2,}|$)", line)
        if match is None:
            continue
        depth, name = len(match[1]), match[2]
        while parents and parents[-1][0] >= depth:
            parents.pop()
        drawn[name] = parents[-1][1] if parents else "Exception"
        parents.append((depth, name))
    real = {c.__name__: next(b.__name__ for b in c.__bases__) for c in CLASSES}
    assert drawn == real


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_carries_its_context(kind: type[EngineError]) -> None:
    error = kind("the kettle is empty", operation="boil", peer="tea", imm=0)
    assert (error.message, error.operation, error.peer, error.imm) == (
        "the kettle is empty", "boil", "tea", 0,
    )  # fmt: skip
    assert str(error) == "the kettle is empty [operation=boil, peer=tea, imm=0]"
    default = kind.default_operation
    assert str(kind("bare")) == (f"bare [operation={default}]" if default else "bare")
    assert kind.__doc__
    assert isinstance(kind.retryable, bool)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_crosses_processes(kind: type[EngineError]) -> None:
    error = kind("gone", operation="read", peer="p", imm=7)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_whether_the_process_is_gone_crosses_too() -> None:
    copy = pickle.loads(pickle.dumps(PeerLost("gone", process_gone=True)))
    assert copy.process_gone


def test_they_are_what_callers_catch_anyway() -> None:
    assert issubclass(errors.DeadlineExceeded, TimeoutError)
    assert issubclass(LinkError, ConnectionError)
    for kind in (errors.LayoutError, errors.PlanError, errors.OutOfRange):
        assert issubclass(kind, ValueError)


def test_only_what_may_pass_by_itself_is_retryable() -> None:
    assert {c.__name__ for c in CLASSES if c.retryable} == {
        "ChecksumMismatch",
        "DeadlineExceeded",
        "DeviceLost",
        "LinkClosed",
        "LinkError",
        "LinkFlushed",
        "PeerAborted",
        "PeerLost",
        "RailError",
        "RailStalled",
        "ReceiverNotReady",
        "RemoteOperationError",
        "RetryExceeded",
    }
