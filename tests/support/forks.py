"""What a child of this process does with what it has inherited."""

from __future__ import annotations

import os
import pickle
import signal
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE_S = 60.0  # reached only when something hangs


def in_child(work: Callable[[], Any]) -> Any:
    """What `work` returns, or raises, in a child of this process; SystemExit is its end."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # this process has threads
        child = os.fork()
    if not child:
        status = 1
        try:
            signal.alarm(int(PATIENCE_S))
            try:
                result = work()
            except SystemExit as error:
                result = error.code
            except BaseException as error:
                result = error
            os.write(writer, pickle.dumps(result))
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as pipe:
        data = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return pickle.loads(data)


def outcomes(calls: dict[str, Callable[[], Any]]) -> dict[str, str]:
    """What each of these calls raises, by name, or returns."""
    found = {}
    for name, call in calls.items():
        try:
            found[name] = repr(call())
        except Exception as error:
            found[name] = type(error).__name__
    return found
