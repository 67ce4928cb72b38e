"""Requests and answers of the OpenAI API, as far as a router has to understand them. Pure."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

Body = dict[str, Any]

TO_PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}
TO_DECODE = {"do_remote_prefill": True, "do_remote_decode": False}
ADDRESS_KEYS = ("remote_engine_id", "remote_host", "remote_port", "remote_agents", "tp_size")
CHARACTERS_A_TOKEN = 4  # of English text; placement needs no better estimate
DONE = b"data: [DONE]\n\n"
DATA_PARALLEL_RANK = re.compile(r"_dp\d+$")  # at the end of the ids that vLLM gives such engines


class Ask(NamedTuple):
    """What is asked of servers: a path of the API, a body, the headers that are passed on, and how
    large the body was."""

    path: str
    body: Body
    headers: dict[str, str]
    nbytes: int = 0

    def with_params(self, params: Body) -> Ask:
        """Return the same with what tells the server where its KV goes or comes from."""
        return self._replace(body=self.body | {"kv_transfer_params": params})


class BadRequest(Exception):
    """What a client sent is no request; says why."""


def read_body(raw: bytes) -> Body:
    """Return the body of a request, without what tells servers where KV comes from: that is for
    routers to say, and whoever says it makes decode dial an address.

    Raises:
        BadRequest: it is no JSON object.
    """
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise BadRequest(f"the body is no JSON: {error}") from error
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    if not isinstance(body, dict):
        raise BadRequest(f"the body must be a JSON object, not {type(body).__name__}")
    body.pop("kv_transfer_params", None)
    extra = body.get("vllm_xargs")  # vLLM passes it on under the same roof
    if isinstance(extra, dict):
        extra.pop("kv_transfer_params", None)
    return body


def encode(body: Body) -> bytes:
    """Return a body as it is sent."""
    return json.dumps(body).encode()


def one_engine_only(body: Body) -> str:
    """Return why a request cannot be split over two engines, so that decode computes all; or ""."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int):
        return "it has several prompts"
    for key in ("n", "best_of"):
        if (body.get(key) or 1) != 1:
            return f"{key} is {body[key]}"
    if body.get("use_beam_search"):
        return "it asks for beam search"
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
    if not isinstance(prompt, list):
        return max(1, _characters(body if prompt is None else prompt) // CHARACTERS_A_TOKEN)
    numbers = sum(isinstance(each, int) for each in prompt)
    lists = sum(len(each) for each in prompt if isinstance(each, list))
    texts = sum(len(each) for each in prompt if isinstance(each, str))
    return max(1, numbers + lists + texts // CHARACTERS_A_TOKEN)


def _characters(asked: Any) -> int:
    """Count the characters of a prompt, or of all messages; an image has none."""
    if isinstance(asked, str):
        return len(asked)
    messages = asked.get("messages") if isinstance(asked, dict) else None
    count = 0
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else (content,):
            text = part.get("text") if isinstance(part, dict) else part
            count += len(text) if isinstance(text, str) else 0
    return count


def address_in(params: Body) -> Body:
    """Return where a prefill engine's agents are, out of what it answered; {} if that is not all
    there, or if the engine is one of several behind its server, of which the next request meets
    another."""
    if DATA_PARALLEL_RANK.search(str(params.get("remote_engine_id"))):
        return {}
    address = {key: params[key] for key in ADDRESS_KEYS if params.get(key)}
    return address if set(ADDRESS_KEYS[:3]) <= address.keys() else {}


def cached_tokens(answer: bytes) -> int | None:
    """Return how many tokens of the prompt a server had in its cache, as its answer says."""
    try:
        return int(json.loads(answer)["usage"]["prompt_tokens_details"]["cached_tokens"])
    except (ValueError, TypeError, KeyError):
        return None


def with_cached_tokens(data: bytes, count: int | None) -> bytes:
    """Return an answer, or an event of a stream, with that count where it has one: tokens that were
    loaded from prefill are none that a cache spared."""
    if b'"cached_tokens"' not in data:
        return data
    is_event = data.startswith(b"data:")
    found = _data(data) if is_event else _object(data)
    usage = found.get("usage") if found else None
    if not isinstance(usage, dict) or not isinstance(usage.get("prompt_tokens_details"), dict):
        return data
    usage["prompt_tokens_details"]["cached_tokens"] = count
    changed = encode(found or {})
    return event(changed) if is_event else changed


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
    return _object(text)


def _object(text: bytes) -> Body | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
