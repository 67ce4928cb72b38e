"""What agents do, put together: each link and handoff once, whoever tells of it."""

from __future__ import annotations

from typing import Any

from kvferry.control.cluster.messages import (
    MAX_SHOWN_LINKS,
    MAX_SHOWN_ROWS,
    Activity,
    Failure,
    FailureRow,
    HandoffRow,
    LinkActivity,
    LinkRow,
    LiveHandoff,
    Load,
    Member,
    Registration,
)
from kvferry.control.cluster.summary import merge, summarize


def member(name: str, role: Any) -> Member:
    return Member(Registration(name, role, 1, "tcp://127.0.0.1:9"), 1)


MEMBERS = [member("p", "prefill"), member("d", "decode")]
LOADS = {"p": Load(rates={"d": 4e9}), "d": Load(rates={"p": 3e9, "gone": 9e9})}
PREFILL = Activity(live=(LiveHandoff("r1", "prefill", "", 0, 2.0), LiveHandoff("r2", "prefill")))
DECODE = Activity(
    links=(LinkActivity("p", "cma", 1e9), LinkActivity("gone", "tcp", 5e9)),
    live=(LiveHandoff("r1", "decode", "p", 64, 1.5),),
    failures=(Failure("r0", "LinkLost", "p", 8.0),),
)


def test_each_link_and_handoff_is_there_once() -> None:
    shown = summarize(7, MEMBERS, LOADS, {"p": PREFILL, "d": DECODE}, {"LinkLost": 1})
    assert shown.request == 7
    assert shown.links == (LinkRow("p", "d", "cma", 1e9, 4e9),)
    assert shown.live == (HandoffRow("r1", "p", "d", 64, 1.5), HandoffRow("r2", "p", "", 0, 0.0))
    assert shown.failures == (FailureRow("r0", "d", "p", "LinkLost", 8.0),)
    assert shown.errors == {"LinkLost": 1}


def test_daemons_that_hear_one_side_each_tell_what_one_would_tell() -> None:
    one = summarize(7, MEMBERS, LOADS, {"p": PREFILL}, {})
    other = summarize(7, MEMBERS, LOADS, {"d": DECODE}, {"LinkLost": 1})
    whole = summarize(7, MEMBERS, LOADS, {"p": PREFILL, "d": DECODE}, {"LinkLost": 1})
    assert merge([one, other]) == merge([other, one]) == whole


def test_only_the_busiest_and_the_oldest_are_shown() -> None:
    names = [f"d{number}" for number in range(MAX_SHOWN_LINKS + 5)]
    members = [MEMBERS[0], *(member(name, "decode") for name in names)]
    activities = {
        name: Activity(
            links=(LinkActivity("p", "tcp", float(number)),),
            live=(LiveHandoff(name, "decode", "p", 1, float(number)),),
        )
        for number, name in enumerate(names)
    }
    shown = summarize(1, members, {}, activities, {})
    assert shown.num_links == len(names)
    assert [link.target for link in shown.links] == names[: -MAX_SHOWN_LINKS - 1 : -1]
    assert [row.decode for row in shown.live] == names[: -MAX_SHOWN_ROWS - 1 : -1]
