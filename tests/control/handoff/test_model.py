"""The invariants of a handoff hold in every order of events; and a machine that breaks one is caught.

The world (`world.py`) loses, delays and duplicates messages, breaks links, and lets either side die
at every step. The machines of `broken_machines.py` show that it can tell right from wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test as run_model

from kvferry.control.handoff import registry
from tests.control.handoff import broken_machines as broken

from .world import NUM_LAYERS, World

if TYPE_CHECKING:
    from collections.abc import Callable

FAST = settings(
    max_examples=150,
    stateful_step_count=50,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
)
LONG = settings(
    FAST,
    max_examples=2_000,
    stateful_step_count=80,
    derandomize=False,
    phases=[Phase.generate, Phase.shrink],
)


def test_invariants_hold_in_a_hostile_world() -> None:
    World.seen.clear()
    run_model(World, settings=settings(FAST, phases=[Phase.generate, Phase.shrink]))
    tried = {
        "Succeed in decode",
        "Fail",
        "Quarantine",
        "TearDownLink",
        "RetireCounter",
        "StartRead",
    }
    assert tried <= set(World.seen), "the world is too tame to prove anything"


@pytest.mark.soak  # new worlds each time: not for a suite that must repeat itself
def test_invariants_hold_in_a_hostile_world_for_longer() -> None:
    run_model(World, settings=LONG)


@pytest.mark.parametrize(
    "part",
    [
        {"DecodePush": broken.FreesOnCancel},
        {"DecodePush": broken.FreesOnLinkDown},
        {"DecodePush": broken.WaitsForEver},
        {"DecodePull": broken.LeavesMidRead},
        {"PrefillHandoff": broken.ConfirmsBeforeDraining},
        {"PrefillHandoff": broken.FreesBeforeWritten},
        {"PrefillHandoff": broken.FreesWhileRead},
        {"PrefillHandoff": broken.WritesTwice},
        {"PrefillHandoff": broken.WritesUncomputed},
    ],
    ids=lambda part: next(iter(part.values())).__name__,
)
def test_a_machine_that_breaks_a_rule_is_caught(
    part: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _break(part, monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run_model(World, settings=settings(FAST, max_examples=3_000))


def _break(part: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the registry make these broken parts in place of its own."""
    for name, broken_part in part.items():
        monkeypatch.setattr(registry, name, broken_part)


# Rare orders of events, played out by hand: the right machines survive them, the broken do not.


def request_overtaken_by_its_cancel(world: World) -> None:
    world.receive("a", "push", 0)
    world.mistreat(0, "late")
    world.cancel("decode", 0)
    world.go_on(10)
    assert world.sides["decode"].released, "the peer confirmed: the blocks are back"
    world.begin_handoff("a", "push", NUM_LAYERS, 0)
    world.deliver_late(0)
    world.go_on(20)


def request_that_comes_when_its_answer_is_forgotten(world: World) -> None:
    world.receive("a", "push", 0)
    world.mistreat(0, "twice")
    world.offer("a", 0)
    world.compute(0, NUM_LAYERS)
    world.go_on(10)
    world.begin_handoff("b", "push", NUM_LAYERS, 20)
    world.begin_handoff("c", "push", NUM_LAYERS, 40)
    assert len(world.sides["decode"].outcomes) == 3
    world.offer("a", 0)
    world.compute(0, NUM_LAYERS)
    world.deliver_late(0)
    world.go_on(20)


def peer_that_is_silent_for_long(world: World) -> None:
    world.begin_handoff("c", "push", NUM_LAYERS, 3)
    world.cancel("decode", 0)
    world.mistreat(len(world.network) - 1, "late")
    decoder = world.sides["decode"]
    (key,) = decoder.blocks
    for kind in ("retry", "recall"):
        world._fire(decoder, key, kind)
        world.go_on(1)
    world.go_on(20)


def write_that_lands_after_the_next_imm_was_taken(world: World) -> None:
    world.begin_handoff("c", "push", NUM_LAYERS, 3)
    world.cancel("decode", 0)
    world.receive("b", "push", 0)
    world.move(0, False)
    world.go_on(20)


RARE: dict[Callable[[World], None], dict[str, Any]] = {
    request_overtaken_by_its_cancel: {"Ledger": broken.ForgetsWhatIsOver},
    request_that_comes_when_its_answer_is_forgotten: {"Ledger": broken.ForgetsTheFloor},
    write_that_lands_after_the_next_imm_was_taken: {"DecodePush": broken.RetiresEarly},
    peer_that_is_silent_for_long: {"DecodePush": broken.TrustsSilence},
}


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("scenario", RARE, ids=lambda scenario: scenario.__name__)
def test_rare_order_of_events(
    scenario: Callable[[World], None], one_sided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _play(World(), scenario, one_sided)
    _break(RARE[scenario], monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        _play(World(), scenario, one_sided)


def _play(world: World, scenario: Callable[[World], None], one_sided: bool) -> None:
    world.begin(one_sided)
    scenario(world)
    world.teardown()
