"""Well-formed requests with values that no honest agent has: each is answered, and nobody else notices."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings

from kvferry.control.cluster.client import DaemonClient
from kvferry.control.cluster.membership import MAX_REGISTRATION_NBYTES, Membership
from kvferry.control.cluster.messages import (
    MAX_MEMBERS,
    MAX_RATES,
    Activity,
    Beat,
    Denied,
    Heartbeat,
    Load,
    Loads,
    Look,
    Member,
    Place,
    Placed,
    Register,
    Registered,
    Registration,
    Show,
    Shown,
    Snapshot,
    Topology,
    answers,
)
from kvferry.control.cluster.summary import summarize
from kvferry.control.daemon.figures import History
from kvferry.control.errors import ControlError, PlacementError
from kvferry.control.placement.fleet import Fleet
from kvferry.control.placement.policy import place
from tests.support.daemon_process import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

WAIT_S = 30.0
MOST = (1 << 63) - 1
SPEEDS = (5e-324, 1e-320, 1e-300, 1e-3, 1e18)


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    process = DaemonProcess("--http", "127.0.0.1:0")
    yield process
    process.end()


def there(name: str, role: str = "prefill", **fields: Any) -> Registration:
    return Registration(name, role, 1, "tcp://127.0.0.1:9", **fields)  # type: ignore[arg-type]


class Asker:
    """Asks a daemon, each time under a new number."""

    def __init__(self, client: DaemonClient) -> None:
        self.client = client
        self.number = 0

    def __call__(self, message: type, *fields: Any, **named: Any) -> Any:
        self.number += 1
        return self.client.ask(message(self.number, *fields, **named), WAIT_S)

    def register(self, registration: Registration, **fields: Any) -> Any:
        return self(Register, 1, registration, 60.0, **fields)


@pytest.fixture
def ask(daemon: DaemonProcess) -> Iterator[Asker]:
    """Whose agent `bystander` the daemon knows before and after."""
    with DaemonClient(daemon.address) as client:
        asker = Asker(client)
        bystander = asker.register(there("bystander", model="another"))
        assert isinstance(bystander, Registered)
        yield asker
        assert isinstance(asker(Heartbeat, "bystander", bystander.generation), Beat)
        assert isinstance(asker(Look), Snapshot)
        assert daemon.process.poll() is None


@pytest.mark.parametrize("speed", SPEEDS)
def test_any_speed_can_be_placed_on(ask: Asker, speed: float) -> None:
    model = str(speed)
    slow = ask.register(there("slow", model=model, tokens_per_s=speed, token_nbytes=MOST))
    ask.register(there("taker", "decode", model=model, tokens_per_s=speed))
    load = Load(queued_tokens=MOST, rates={"taker": 5e-324})
    assert isinstance(ask(Heartbeat, "slow", slow.generation, load), Beat)
    for tokens in (0, 1, MOST):
        placed = ask(Place, tokens, model)
        assert isinstance(placed, Placed)
        assert (placed.prefill, placed.decode) == ("slow", "taker")


def test_handoffs_are_counted_in_any_number_of_buckets(ask: Asker) -> None:
    generation = ask.register(there("teller")).generation
    for age_s, counts in enumerate(((1,), (1, 2), (), (3,) * 32, (MOST,))):
        activity = Activity(age_s=float(age_s), seconds=counts)
        assert isinstance(ask(Heartbeat, "teller", generation, Load(), activity), Beat)


def test_counts_that_overflow_are_shown_as_the_largest_number(ask: Asker) -> None:
    for name in ("first", "second"):
        generation = ask.register(there(name)).generation
        for age_s, count in ((0.0, 0), (0.1, MOST)):
            told = Activity(age_s=age_s, nbytes=count, errors={"Error": count})
            assert isinstance(ask(Heartbeat, name, generation, Load(), told), Beat)
    shown = summarize(1, (), {}, {}, {"Error": 2 * MOST})
    assert shown.errors == {"Error": MOST}
    assert answers.decode(answers.encode(shown)) == shown
    assert isinstance(ask(Show), Shown)


def test_an_earlier_generation_leaves_room_for_later_ones(ask: Asker) -> None:
    for number in range(3):
        first = ask.register(there(f"again-{number}"), previous=MOST)
        assert isinstance(first, Registered)
        assert first.generation < MOST


def test_a_registration_larger_than_a_snapshot_has_room_for_is_denied(ask: Asker) -> None:
    wide = there("wide", transports=("x" * 256,) * 16, model="y" * 256)
    denied = ask.register(msgspec.structs.replace(wide, topology=Topology(rails=("z" * 256,) * 64)))
    assert isinstance(denied, Denied)
    assert str(MAX_REGISTRATION_NBYTES) in denied.detail
    assert isinstance(ask.register(wide), Registered)


def test_as_many_members_as_two_daemons_accept_can_be_told() -> None:
    """Each has room for one more, and neither knows of the other's yet."""
    members = tuple(Member(there(f"a{number}"), number + 1) for number in range(MAX_MEMBERS + 2))
    answers.encode(Snapshot(1, 1, 1, "tcp://127.0.0.1:1", members))


def test_loads_with_all_their_rates_are_told_in_parts() -> None:
    """Each part is one that readers take, and together they are what was heard."""
    membership = Membership(epoch=1, first_generation=1, publisher="")
    rates = {f"engine-{peer:08x}-4b1c-9a7e/0": 1.5e9 for peer in range(MAX_RATES)}
    told = {f"agent-{number}": Load(1, 2, 3, 4, rates) for number in range(200)}
    for number, (name, load) in enumerate(told.items(), 1):
        answer = membership.answer(Register(number, 1, there(name)), 0.0)
        assert isinstance(answer, Registered)
        membership.answer(Heartbeat(number, name, answer.generation, load), 0.0)
    heard: dict[str, Load] = {}
    for loads in membership.flush_loads():
        assert isinstance(loads, Loads)
        frame = answers.encode(loads)
        assert len(frame) < 1 << 20  # read without being walked first
        heard |= answers.decode(frame).loads
    assert heard == told
    assert membership.flush_loads() == []


def test_a_policy_that_fails_is_told_to_whoever_asked_for_it(ask: Asker) -> None:
    answer = ask(Place, 1, "", policy="\x00" * 256)
    assert isinstance(answer, Denied)
    assert "policy" in answer.detail


# Any values at all -------------------------------------------------------------------------------

COUNTS = st.one_of(st.sampled_from([0, 1, MOST, MOST + 1, -1]), st.integers())
NUMBERS = st.one_of(
    st.sampled_from([*SPEEDS, 0.0, -0.0, math.inf, -math.inf, math.nan]), st.floats()
)
TEXTS = st.one_of(
    st.sampled_from(["", "p", "d", "x" * 256, "x" * 257, "\x00", "\ud800", "../p", "p\n"]),
    st.text(max_size=300),
)
TIMEOUTS = st.one_of(st.sampled_from([0.0, -1.0, math.nan, math.inf, 1e300, 0.01, 5.0]), st.none())
CALLS: Any = st.one_of(
    st.tuples(
        st.just("place"),
        st.tuples(COUNTS),
        st.fixed_dictionaries(
            {},
            optional={
                "model": TEXTS,
                "policy": TEXTS,
                "cached": st.dictionaries(TEXTS, COUNTS, max_size=300),
                "exclude": st.lists(TEXTS, max_size=300).map(tuple),
            },
        ),
    ),
    st.tuples(st.sampled_from(["drain", "restore"]), st.tuples(TEXTS), st.just({})),
    st.tuples(st.just("flip"), st.tuples(TEXTS, TEXTS), st.just({})),
    st.tuples(st.just("look"), st.just(()), st.fixed_dictionaries({"loads": st.booleans()})),
    st.tuples(st.just("show"), st.just(()), st.just({})),
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(calls=st.lists(st.tuples(CALLS, TIMEOUTS), min_size=1, max_size=4))
def test_every_call_of_a_client_ends_with_an_answer_or_a_named_error(
    ask: Asker, calls: list[Any]
) -> None:
    ask.register(there("p", num_blocks=MOST, tokens_per_block=MOST))
    ask.register(there("d", "decode"))
    for (name, arguments, named), timeout_s in calls:
        given_s = {} if timeout_s is None else {"timeout_s": timeout_s}
        never_ends = timeout_s is not None and not timeout_s <= 5.0
        expected = (
            pytest.raises(ValueError, match="timeout_s")
            if never_ends
            else contextlib.suppress(ControlError)
        )
        with expected:
            getattr(ask.client, name)(*arguments, **named, **given_s)


AGENTS = st.builds(
    Registration,
    st.sampled_from(["p", "d", "x"]),
    st.sampled_from(["prefill", "decode", "both"]),
    st.just(1),
    st.just("tcp://127.0.0.1:9"),
    num_blocks=st.integers(0, MOST),
    tokens_per_block=st.integers(0, MOST),
    token_nbytes=st.integers(0, MOST),
    tokens_per_s=st.floats(0, 1e18),
)
HEARD = st.builds(
    Load,
    st.integers(0, MOST),
    st.integers(0, MOST),
    rates=st.dictionaries(st.sampled_from(["p", "d", "x"]), st.floats(0, 1e18)),
)


@settings(deadline=None)
@given(
    agents=st.lists(st.tuples(AGENTS, HEARD), max_size=3, unique_by=lambda one: one[0].name),
    tokens=st.integers(0, MOST),
)
def test_what_messages_may_say_can_be_placed_on(agents: list[Any], tokens: int) -> None:
    """The estimate is one that the answer has room for."""
    fleet = Fleet(
        [Member(registration, 1) for registration, _ in agents],
        {registration.name: load for registration, load in agents},
    )
    for _ in range(3):
        try:
            decision = place(fleet, Place(1, tokens))
        except PlacementError:
            return
        placed = Placed(
            1, decision.prefill, decision.decode, 1, 1, decision.estimate_s, decision.reason
        )
        answers.encode(placed)
        fleet.reserve(decision, tokens)


@settings(deadline=None)
@given(
    st.lists(
        st.builds(
            Activity,
            age_s=st.floats(0, 1e18),
            nbytes=st.integers(0, MOST),
            seconds=st.lists(st.integers(0, MOST), max_size=32).map(tuple),
            errors=st.dictionaries(st.sampled_from("ab"), st.integers(0, MOST)),
        )
    )
)
def test_what_heartbeats_may_tell_can_be_shown(told: list[Activity]) -> None:
    history = History(0.0)
    for number, activity in enumerate(told):
        history.take("a", activity, float(number))
        history.turn(3.0 * number, 0.0)
    answers.encode(summarize(1, (), {}, history.activities, history.errors))
    msgspec.json.encode(tuple(history.points))
