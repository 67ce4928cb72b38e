"""What callers give an agent, checked where they give it: everything that is sent can be encoded."""

from __future__ import annotations

import hashlib
import math
import operator
from typing import Any

MAX_ID_CHARS = 256  # of a name in a message
MAX_SECONDS = 7 * 86_400.0
SOON_S = 1e-3  # of a deadline that has passed: what has it ends at once, as others end


def name_of(request_id: Any) -> str:
    """Return the name by which messages call a request: its id, or the hash of one that is long.

    Raises:
        ValueError: it is no text.
    """
    if not isinstance(request_id, str):
        raise ValueError(f"request_id must be text, not {request_id!r}")  # noqa: TRY004 - one class
    if 0 < len(request_id) <= MAX_ID_CHARS and request_id.isprintable():
        return request_id
    return "sha256:" + hashlib.sha256(request_id.encode("utf-8", "surrogatepass")).hexdigest()


def natural(name: str, value: Any, most: int = (1 << 63) - 1) -> int:
    """Return a number of things as Python's own, whatever kind of integer it is.

    Raises:
        ValueError: it is no integer, or out of range.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, not {value!r}") from None
    if not 0 <= number <= most:
        raise ValueError(f"{name} must be from 0 to {most}, not {number}")
    return number


def seconds(name: str, value: Any) -> float:
    """Return a deadline; one that has passed is over at once.

    Raises:
        ValueError: it is no number of seconds, or more than seven days.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number of seconds, not {value!r}") from None
    if math.isnan(number) or number > MAX_SECONDS:
        raise ValueError(f"{name} must be at most {MAX_SECONDS:.0f} seconds, not {value!r}")
    return max(number, SOON_S)


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Check a choice.

    Raises:
        ValueError: it is none of these.
    """
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, not {value!r}")
