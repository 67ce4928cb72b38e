"""Whatever an agent is given: each call ends or is refused by name, and the agent lives."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvferry import Agent, KVLayout
from kvferry.control.errors import ConfigError, ControlError
from kvferry.engine.errors import EngineError, PlanError

if TYPE_CHECKING:
    from collections.abc import Iterator

DIMS = "layer block token dim"
REFUSED = (ValueError, TypeError, ControlError, EngineError)


def make(name: str, role: Any, **options: Any) -> Agent:
    pool = np.zeros((2, 8, 4, 8), np.float16)
    layout = KVLayout.from_tensors(pool, DIMS)
    return Agent(name=name, role=role, layout=layout, tensors=pool, **options)


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Agent, Agent]]:
    with make("p", "prefill") as prefill, make("d", "decode") as decode:
        decode.connect(prefill.address)
        yield prefill, decode


def hand_over(pair: tuple[Agent, Agent], name: str) -> None:
    """A plain handoff goes well: both agents live."""
    prefill, decode = pair
    sending = prefill.send(name, [1, 2])
    decode.receive(name, "p", [3, 4], timeout_s=30).wait(40)
    sending.wait(40)


@pytest.mark.parametrize("request_id", ["", "x" * 300, "a\ud800b", "a\nb", "ä" * 256])
def test_any_text_names_a_request(pair: tuple[Agent, Agent], request_id: str) -> None:
    hand_over(pair, request_id)


@pytest.mark.parametrize("timeout_s", [0, -1.5, np.float32(-3), -math.inf])
def test_a_deadline_that_has_passed_ends_at_once(pair: tuple[Agent, Agent], timeout_s: Any) -> None:
    handoff = pair[1].receive("late", "p", [5], timeout_s=timeout_s)
    with pytest.raises(ControlError):
        handoff.wait(30)
    handoff.blocks_free.wait(30)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"timeout_s": math.inf}, "timeout_s must be at most 604800 seconds"),
        ({"timeout_s": math.nan}, "timeout_s must be at most"),
        ({"timeout_s": "soon"}, "timeout_s must be a number of seconds"),
        ({"skip_blocks": -1}, "skip_blocks must be from 0 to"),
        ({"skip_blocks": 1.5}, "skip_blocks must be an integer"),
        ({"mode": "shove"}, "mode must be 'push' or 'pull'"),
    ],
)
def test_what_no_message_takes_is_refused_where_it_is_given(
    pair: tuple[Agent, Agent], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        pair[1].receive("r", "p", [5], **options)
    with pytest.raises(ValueError, match="request_id must be text"):
        pair[1].receive(5, "p", [5])  # type: ignore[arg-type]


def test_numbers_may_be_numpys(pair: tuple[Agent, Agent]) -> None:
    sending = pair[0].send("numpy", np.array([1, 2]))
    decode = pair[1]
    decode.receive("numpy", "p", [6], skip_blocks=np.int64(1), timeout_s=np.float64(30)).wait(40)
    sending.wait(40)
    decode.report(queued_tokens=np.int32(4), free_blocks=np.int64(3))
    with pytest.raises(ValueError, match="queued_tokens must be from 0"):
        decode.report(queued_tokens=-1)


def test_no_tokens_are_not_all(pair: tuple[Agent, Agent]) -> None:
    with pytest.raises(PlanError, match="nothing to receive"):
        pair[1].receive_tokens("none", "p", [1, 2], num_tokens=0)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"daemon": "127.0.0.1:7717"}, ConfigError, "write tcp://HOST:PORT"),
        ({"daemon": "tcp://127.0.0.1:1", "model": "m" * 300}, ValueError, r"\$\.model"),
        ({"daemon": "tcp://127.0.0.1:1", "tokens_per_s": math.nan}, ValueError, r"tokens_per_s"),
        ({"daemon": "tcp://127.0.0.1:1", "lease_s": math.inf}, ValueError, "lease_s must be"),
    ],
)
def test_an_agent_that_no_daemon_would_register_is_refused(
    options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        make("a", "decode", **options)


ODD: Any = st.one_of(
    st.none(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(max_size=9),
    st.lists(st.integers(-3, 40), max_size=4),
    st.builds(np.int64, st.integers(-5, 99)),
    st.builds(np.zeros, st.sampled_from([0, (2, 2)])),
)


@given(request_id=ODD, ids=ODD, timeout_s=ODD, skip=ODD, tokens=ODD)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_call_ends_and_both_agents_live(
    pair: tuple[Agent, Agent], request_id: Any, ids: Any, timeout_s: Any, skip: Any, tokens: Any
) -> None:
    prefill, decode = pair
    begun = []
    for call in (
        lambda: prefill.send(request_id, ids, timeout_s=timeout_s),
        lambda: decode.receive(request_id, "p", ids, timeout_s=timeout_s, skip_blocks=skip),
        lambda: decode.receive_tokens(request_id, "p", ids, num_tokens=tokens, timeout_s=timeout_s),
        lambda: decode.report(queued_tokens=tokens, free_blocks=skip),
    ):
        try:
            begun.append(call())
        except REFUSED:
            continue
    for handoff in begun:
        if handoff is not None:
            handoff.cancel()
            handoff.blocks_free.wait(60)
    hand_over(pair, "plain")
