"""Requests and answers of the OpenAI API, as far as a router has to understand them. Pure."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

Body = dict[str, Any]

TO_PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}
TO_DECODE = {"do_remote_prefill": True, "do_remote_decode": False}
ADDRESS_KEYS = ("remote_engine_id", "remote_host", "remote_port", "remote_agents", "tp_size")
CHARACTERS_A_TOKEN = 4  # of English text; placement needs no better estimate
DONE = b"data: [DONE]\n\n"


class Ask(NamedTuple):
    """What is asked of servers: a path of the API, a body, and the headers that are passed on."""

    path: str
    body: Body
    headers: dict[str, str]

    def with_params(self, params: Body) -> Ask:
        """Return the same with what tells the server where its KV goes or comes from."""
        return self._replace(body=self.body | {"kv_transfer_params": params})


class BadRequest(Exception):
    """What a client sent is no request; says why."""


def read_body(raw: bytes) -> Body:
    """Return the body of a request.

    Raises:
        BadRequest: it is no JSON object.
    """
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise BadRequest(f"the body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequest(f"the body must be a JSON object, not {type(body).__name__}")
    return body


def one_engine_only(body: Body) -> str:
    """Return why a request cannot be split over two engines, so that decode computes all; or ""."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int):
        return "it has several prompts"
    for key in ("n", "best_of"):
        if (body.get(key) or 1) != 1:
            return f"{key} is {body[key]}"
    if body.get("prompt_logprobs") is not None or (body.get("echo") and body.get("logprobs")):
        return "it asks for logprobs of the prompt"
    return ""


def for_prefill(body: Body) -> Body:
    """Return the request as prefill gets it: one token, in one answer."""
    dropped = ("stream", "stream_options", "min_tokens", "best_of", "max_completion_tokens")
    short = {key: value for key, value in body.items() if key not in dropped}
    limit = "max_completion_tokens" if "messages" in body else "max_tokens"
    if "messages" in body:
        short.pop("max_tokens", None)
    return short | {"stream": False, limit: 1}


def estimate_tokens(body: Body) -> int:
    """About how many tokens the prompt has."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        return len(prompt)
    if isinstance(prompt, list):
        return sum(estimate_tokens({"prompt": each}) for each in prompt)
    text = prompt if isinstance(prompt, str) else json.dumps(body.get("messages", ""))
    return max(1, len(text) // CHARACTERS_A_TOKEN)


def address_in(params: Body) -> Body:
    """Return where a prefill engine's agents are, out of what it answered; {} if that is not all
    there."""
    address = {key: params[key] for key in ADDRESS_KEYS if params.get(key)}
    return address if set(ADDRESS_KEYS[:3]) <= address.keys() else {}


def error_body(message: str, kind: str, status: int) -> bytes:
    """Return an error as OpenAI's clients read it."""
    error = {"message": message, "type": kind, "param": None, "code": status}
    return json.dumps({"error": error}).encode()


def event(data: bytes) -> bytes:
    """Return one server-sent event."""
    return b"data: " + data + b"\n\n"


def split_events(held: bytes) -> tuple[list[bytes], bytes]:
    """Return the whole events in what has come so far, and the beginning of the next."""
    *whole, rest = held.replace(b"\r\n", b"\n").split(b"\n\n")
    return [each + b"\n\n" for each in whole], rest


def error_in(one: bytes) -> str:
    """Return the error that an event carries, or ""."""
    data = _data(one)
    error = data.get("error") if data else None
    if not error:
        return ""
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def opens_only(one: bytes) -> bool:
    """Return whether an event only opens an answer: a role, and no token yet."""
    data = _data(one)
    choices = data.get("choices") if data else None
    if not choices or not all(isinstance(choice, dict) for choice in choices):
        return False
    return all(
        isinstance(choice.get("delta"), dict)
        and set(choice["delta"]) <= {"role", "content"}
        and not choice["delta"].get("content")
        and not choice.get("finish_reason")
        for choice in choices
    )


def _data(one: bytes) -> Body | None:
    text = b"".join(
        line[len(b"data:") :] for line in one.splitlines() if line.startswith(b"data:")
    ).strip()
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
