"""Starts the demo's two processes, follows what they tell, and ends them, whatever happens."""

from __future__ import annotations

import contextlib
import importlib.metadata
import multiprocessing
import os
import re
import signal
import threading
import time
from multiprocessing import connection
from typing import TYPE_CHECKING, Any

from kvferry.tools.demo.events import Failed, Finished, Started

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

    from kvferry.tools.demo.events import Event, Options

OLDEST_TRANSFORMERS = (4, 57)
_SETTLE_S = 0.5
"""How long a worker's complaint waits for the news that the other worker died, its likely cause."""


class DemoError(RuntimeError):
    """The demo could not run to its end; one sentence says why."""


def check_requirements() -> None:
    """Look for transformers by its metadata: importing it takes seconds.

    Raises:
        DemoError: it is missing or too old.
    """
    wanted = ".".join(str(part) for part in OLDEST_TRANSFORMERS)
    fix = "install it with: pip install 'kvferry[demo]'"
    try:
        have = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise DemoError(f"the demo needs transformers {wanted} or newer; {fix}") from None
    if tuple(int(part) for part in re.findall(r"\d+", have)[:2]) < OLDEST_TRANSFORMERS:
        raise DemoError(f"the demo needs transformers {wanted} or newer, not {have}; {fix}")


def run(options: Options, on_event: Callable[[Event], None]) -> None:
    """Run both workers to their end; `on_event` sees everything they tell, in this thread.

    When it returns or raises, neither worker is running.

    Raises:
        DemoError: a worker failed, died, or fell silent.
    """
    check_requirements()
    context = multiprocessing.get_context("spawn")
    ours: dict[str, Any] = {}
    workers: dict[str, SpawnProcess] = {}
    to_decode, to_prefill = context.Pipe()
    try:
        for role, peer in (("prefill", to_decode), ("decode", to_prefill)):
            receiver, sender = context.Pipe(duplex=False)
            worker = context.Process(
                target=_work,
                args=(role, options, sender, peer),
                name=f"kvferry-{role}",
                daemon=True,
            )
            worker.start()
            sender.close()  # so that the worker's death is the end of its pipe
            peer.close()
            ours[role], workers[role] = receiver, worker
        _follow(options, ours, workers, on_event)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.join()
        for pipe in (*ours.values(), to_decode, to_prefill):
            pipe.close()


def _follow(
    options: Options,
    pipes: dict[str, Any],
    workers: dict[str, SpawnProcess],
    on_event: Callable[[Event], None],
) -> None:
    """Pass events on until both workers have finished."""
    running: dict[Any, str] = {pipe: role for role, pipe in pipes.items()}
    unfinished = set(pipes)
    deadline_s = time.monotonic() + options.silence_s
    while running:
        ready = connection.wait(list(running), max(0.0, deadline_s - time.monotonic()))
        if not ready:
            raise DemoError(f"the workers were silent for {options.silence_s:.0f} s")
        deadline_s = time.monotonic() + options.silence_s
        for pipe in [pipe for pipe in running if pipe in ready]:
            role = running[pipe]
            try:
                event: Event = pipe.recv()
            except (EOFError, ConnectionResetError):
                del running[pipe]
                if role in unfinished:
                    raise DemoError(_blame(role, "", workers)) from None
                continue
            if isinstance(event, Failed):
                raise DemoError(_blame(event.role, event.message, workers))
            if isinstance(event, Finished):
                unfinished.discard(role)
            on_event(event)


def _blame(role: str, message: str, workers: dict[str, SpawnProcess]) -> str:
    """Return what to say when `role` failed with `message`, or ended without one.

    A worker that a signal killed could not speak for itself, and the other's complaint is only
    what followed: so it is named, if there is one.
    """
    said = f" ({role} said: {message})" if message else ""
    for name in sorted(workers, key=lambda name: name == role, reverse=not message):
        workers[name].join(_SETTLE_S)
        code = workers[name].exitcode
        if code is not None and code < 0:
            how = signal.Signals(-code).name
            return f"the {name} process (pid {workers[name].pid}) was killed by {how}{said}"
    if message:
        return f"the {role} process failed: {message}"
    code = workers[role].exitcode
    return f"the {role} process (pid {workers[role].pid}) ended early with exit status {code}"


def _work(role: str, options: Options, parent: Connection, peer: Connection) -> None:
    """Is one worker, in a process of its own; every failure becomes one event, then it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # before torch: the same sums every time
    try:
        parent.send(Started(role, os.getpid()))
        import torch

        torch.set_num_threads(1)
        device = options.devices[role == "decode"]
        if device != "cpu":
            torch.cuda.set_device(device)
            _repeat_exactly()
        from kvferry.tools.demo import workers

        body = workers.prefill if role == "prefill" else workers.decode
        body(options, parent, peer)
    except Exception as error:
        with contextlib.suppress(OSError):  # the parent may be gone: then nobody is left to tell
            parent.send(Failed(role, f"{type(error).__name__}: {error}"))
        # Not through the interpreter's exit: a thread that waits for a dead peer must not hold it.
        os._exit(1)


def _repeat_exactly() -> None:
    """Leave torch the one attention kernel for CUDA that gives the same bits every time.

    With the others, equal caches gave other tokens in one of twelve batches on an H200.
    """
    import torch

    torch.backends.cuda.enable_flash_sdp(enabled=False)
    torch.backends.cuda.enable_mem_efficient_sdp(enabled=False)
    torch.backends.cuda.enable_cudnn_sdp(enabled=False)
    torch.backends.cuda.enable_math_sdp(enabled=True)


def _end_with_parent() -> None:
    """End this process with its parent, however that one ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
