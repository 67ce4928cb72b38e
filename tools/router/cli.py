"""`kvferry router`: one OpenAI-compatible address in front of prefill and decode servers of vLLM."""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import Annotated, Any, Optional

import typer

from kvferry.control.cluster.client import DEFAULT_DAEMON
from kvferry.control.errors import ControlError
from kvferry.control.keys import Keys
from kvferry.tools.agents import DaemonOption, KeysOption  # noqa: TC001 - typer reads them

from .backends import Backends, DaemonBackends, FixedBackends

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
CLOSE_S = 5.0  # for requests that are under way when the router is told to end

Urls = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer evaluates it
    typer.Option(help="URL of such a server; again for more. Without any, the daemon is asked."),
]


def router(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    prefill: Urls = None,
    decode: Urls = None,
    daemon: DaemonOption = DEFAULT_DAEMON,
    keys: KeysOption = None,
    policy: Annotated[str, typer.Option(help="The daemon's placement policy.")] = "",
    attempts: Annotated[int, typer.Option(min=1, help="Pairs that a request is tried on.")] = 3,
    timeout_s: Annotated[
        float, typer.Option(min=0.1, help="How long a server may be silent.")
    ] = 600.0,
    together: Annotated[
        bool, typer.Option(help="Call both servers at once, so that layers go out one by one.")
    ] = True,
) -> None:
    """Serve the OpenAI API: prompts on prefill servers, tokens from decode servers."""
    try:
        from .server import Router
    except ModuleNotFoundError as error:
        if error.name != "aiohttp":
            raise
        raise typer.BadParameter(
            "the router needs aiohttp: pip install 'kvferry[router]'"
        ) from error
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    if bool(prefill) != bool(decode):
        raise typer.BadParameter("give both --prefill and --decode, or neither and a daemon")
    for url in (*(prefill or ()), *(decode or ())):
        if not url.startswith(("http://", "https://")):
            raise typer.BadParameter(f"{url!r} is no URL: write http://host:port")
    try:
        backends: Backends
        if prefill and decode:
            backends = FixedBackends(prefill, decode)
        else:
            backends = DaemonBackends(daemon, Keys.load(str(keys)) if keys else None, policy)
    except ControlError as error:
        raise typer.BadParameter(error.message) from error
    try:
        server = Router(backends, attempts=attempts, timeout_s=timeout_s, together=together)
        asyncio.run(_serve(server, host, port))
    except OSError as error:
        backends.close()
        raise typer.BadParameter(
            f"cannot listen at {host}:{port}: {error.strerror}; give a free --port"
        ) from error


async def _serve(router: Any, host: str, port: int) -> None:
    """Serve until a signal."""
    from aiohttp import web

    runner = web.AppRunner(router.app, handler_cancellation=True, shutdown_timeout=CLOSE_S)
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        bound = runner.addresses[0]
        typer.echo(f"kvferry router: listening on http://{bound[0]}:{bound[1]}")
        await ended.wait()
    finally:
        await runner.cleanup()
