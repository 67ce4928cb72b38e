"""A small server that speaks vLLM's OpenAI API as far as a router needs it, and fails when told to."""

from __future__ import annotations

import json
import queue
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

WAIT_S = 30.0  # reached only when something hangs
LOOK_S = 0.02

_computed: set[str] = set()  # transfers whose prefill has been answered, of all servers


class ApiServer:
    """A prefill or a decode server (or one that knows of neither); its answers say which request and whose KV they are of.

    Attributes:
        plan: what the next requests meet, in order: `ok` (also when it is empty), `500`, `400`,
            `drop` (no answer), `hang` (until `released`), `break` (the stream breaks after a token),
            `open then error` (a stream's role, then an error), `error event`.
        bodies, headers: of the requests, in order.
        gone_away: set when a client went away while it was being answered.
        hanging: set when a request hangs, or waits for what prefill computes.
        after: what it waits for before it does anything else with a request.
        health: the status of `/health`; None leaves who asks without an answer.
        models: what it says it serves.
        cached_tokens: what its answers say of the prompt; nothing if None.
        engine_ids: of the engines behind it, which take requests by turns.
    """

    def __init__(self, name: str, role: str, port: int = 0) -> None:
        self.name = name
        self.role = role
        self.plan: queue.Queue[str] = queue.Queue()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.gone_away = threading.Event()
        self.hanging = threading.Event()
        self.released = threading.Event()
        self.after: threading.Event | None = None
        self.engine_id = f"engine-of-{name}"
        self.engine_ids = [self.engine_id]
        self.health: int | None = 200
        self.models = ["tiny"]
        self.cached_tokens: int | None = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                models = {"object": "list", "data": [{"id": each} for each in outer.models]}
                if self.path == "/v1/models":
                    self.reply(200, models)
                elif outer.health is None:
                    outer._hang(self, lambda: outer.health is not None)
                    self.close_connection = True
                else:
                    self.reply(outer.health, {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body)
                outer.headers.append(dict(self.headers))
                try:
                    fate = outer.plan.get_nowait()
                except queue.Empty:
                    fate = "ok"
                outer._answer(self, self.path, body, fate)

            def reply(self, status: int, answer: Any) -> None:
                raw = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Nobody answers at its port from here on."""
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, handler: Any, path: str, body: dict[str, Any], fate: str) -> None:
        if self.after is not None:
            assert self.after.wait(WAIT_S)
        if fate == "hang":
            self._hang(handler, self.released.is_set)
            fate = "drop"
        params = body.get("kv_transfer_params") or {}
        waits = self.role == "decode" and "transfer_id" in params and fate == "ok"
        if waits and not self._hang(handler, lambda: params["transfer_id"] in _computed):
            fate = "drop"
        if fate == "drop":
            handler.close_connection = True
        elif fate in ("400", "500"):
            error = {"error": {"message": f"{self.name} says no", "code": int(fate)}}
            handler.reply(int(fate), error)
        elif self.role == "prefill":
            _computed.add(params.get("transfer_id", ""))
            answer: dict[str, Any] = {"choices": [], "kv_transfer_params": self._params(body)}
            handler.reply(200, answer | self._usage())
        elif body.get("stream"):
            self._stream(handler, path, body, fate)
        else:
            text = self._text(body)
            choice: dict[str, Any] = (
                {"message": {"content": text}} if "chat" in path else {"text": text}
            )
            answer = {"choices": [choice | {"finish_reason": "length"}]}
            handler.reply(200, answer | self._usage())

    def _hang(self, handler: Any, over: Callable[[], bool]) -> bool:
        """Waits until it is over; False if the client went away."""
        self.hanging.set()
        handler.connection.settimeout(LOOK_S)  # who goes away makes the socket readable
        while not over():
            try:
                if not handler.connection.recv(1):
                    self.gone_away.set()
                    return False
            except TimeoutError:
                continue
        handler.connection.settimeout(WAIT_S)
        return True

    def _params(self, body: dict[str, Any]) -> dict[str, Any]:
        asked = body["kv_transfer_params"]
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": self.engine_ids[len(self.bodies) % len(self.engine_ids)],
            "remote_request_id": asked.get("transfer_id") or f"{self.name}-{len(self.bodies)}",
            "remote_host": "127.0.0.1",
            "remote_port": 7000,
        }

    def _usage(self) -> dict[str, Any]:
        if self.cached_tokens is None:
            return {}
        details = {"cached_tokens": self.cached_tokens}
        return {"usage": {"prompt_tokens": 32, "prompt_tokens_details": details}}

    def _text(self, body: dict[str, Any]) -> str:
        params = body.get("kv_transfer_params")
        if not params or self.role == "plain":
            return f"{self.name} computed all"
        return f"{self.name} with KV of {params['remote_engine_id']}"

    def _stream(self, handler: Any, path: str, body: dict[str, Any], fate: str) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream; charset=utf-8")
        handler.end_headers()
        chat = "chat" in path

        def say(event: dict[str, Any]) -> None:
            handler.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            handler.wfile.flush()

        try:
            if chat:
                delta = {"role": "assistant", "content": ""}
                say({"choices": [{"delta": delta, "finish_reason": None}]})
            if fate in ("error event", "open then error"):
                say({"error": {"message": f"{self.name} could not load", "code": 500}})
                return
            for word in self._text(body).split():
                part = {"delta": {"content": f"{word} "}} if chat else {"text": f"{word} "}
                say({"choices": [part | {"finish_reason": None}]})
                if fate == "break":
                    return
                if fate == "pause":
                    self.hanging.set()
                    assert self.released.wait(WAIT_S)
            while fate == "endless":
                say({"choices": [{"text": "more "}]})
            if self.cached_tokens is not None:
                say({"choices": []} | self._usage())
            handler.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.gone_away.set()
