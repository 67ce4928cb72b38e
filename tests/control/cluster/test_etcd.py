"""Daemons that share their members in a real etcd: any of them serves, and any of it may die."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest

from kvferry.control.cluster.client import DaemonClient
from kvferry.control.cluster.messages import (
    Activity,
    Beat,
    Denied,
    Deregister,
    Done,
    Heartbeat,
    LiveHandoff,
    Load,
    Register,
    Registered,
    Registration,
)
from kvferry.control.errors import PlacementError
from tests.support.daemon_process import DaemonProcess
from tests.support.etcd_process import EtcdProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kvferry.control.cluster.client import Watch
    from kvferry.control.cluster.messages import Member

WAIT_S = 30.0
numbers = itertools.count(1)
clusters = itertools.count(1)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shared_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdProcess]:
    process = EtcdProcess(tmp_path_factory.mktemp("etcd"))
    yield process
    process.end()


@pytest.fixture
def own_etcd(tmp_path: Path) -> Iterator[EtcdProcess]:
    """One that the test may kill."""
    process = EtcdProcess(tmp_path)
    yield process
    process.end()


class Daemons:
    """Makes daemons, and ends them."""

    def __init__(self) -> None:
        self._started: list[DaemonProcess] = []

    def start(self, store: str) -> DaemonProcess:
        self._started.append(DaemonProcess("--store", store))
        return self._started[-1]

    def pair(self, store: str) -> tuple[DaemonProcess, DaemonProcess]:
        """Two, which have heard from the store."""
        both = self.start(store), self.start(store)
        for daemon in both:
            with DaemonClient(daemon.address) as client:
                client.look(timeout_s=WAIT_S)
        return both

    def end(self) -> None:
        for process in self._started:
            process.end()


@pytest.fixture
def daemons() -> Iterator[Daemons]:
    made = Daemons()
    yield made
    made.end()


@pytest.fixture(scope="module")
def pair(shared_etcd: EtcdProcess) -> Iterator[tuple[DaemonProcess, DaemonProcess]]:
    """Two daemons that live, for all tests with agents of their own names."""
    made = Daemons()
    yield made.pair(f"{shared_etcd.url}/shared")
    made.end()


@pytest.fixture
def mortal_pair(shared_etcd: EtcdProcess, daemons: Daemons) -> tuple[DaemonProcess, DaemonProcess]:
    """Two daemons of a cluster that nobody else uses, and that may be killed."""
    return daemons.pair(f"{shared_etcd.url}/mortal-{next(clusters)}")


def ask(client: DaemonClient, message: Any) -> Any:
    """The answer, once the daemon and its store have come up."""
    while True:
        answer = client.ask(message, WAIT_S)
        if not (isinstance(answer, Denied) and answer.reason == "store"):
            return answer


def register(client: DaemonClient, name: str, role: str = "prefill", **fields: Any) -> Any:
    previous, lease_s = fields.pop("previous", 0), fields.pop("lease_s", 60.0)
    life = fields.pop("life", 1)
    there = Registration(name, role, life, "tcp://127.0.0.1:9", **fields)  # type: ignore[arg-type]
    answer = ask(client, Register(next(numbers), 1, there, lease_s, previous))
    assert isinstance(answer, Registered), answer
    return answer


def beat(client: DaemonClient, name: str, generation: int, load: Load | None = None) -> Any:
    return client.ask(Heartbeat(next(numbers), name, generation, load or Load()), WAIT_S)


def until(watch: Watch, condition: Callable[[dict[str, Member]], bool]) -> dict[str, Member]:
    while not condition(watch.view.members):
        watch.poll(WAIT_S)
    return watch.view.members


def test_what_one_daemon_is_told_all_know(pair: tuple[DaemonProcess, DaemonProcess]) -> None:
    with DaemonClient(pair[0].address) as one, DaemonClient(pair[1].address) as two:
        registered = register(one, "p0")
        register(two, "d0", "decode")
        with two.watch() as watch:
            member = until(watch, lambda members: "p0" in members)["p0"]
            assert member.generation == registered.generation
            two.drain("p0")
            until(watch, lambda members: members["p0"].state == "draining")
            two.flip("p0", "decode")
            # The other daemon hears of it from the store, a little later.
            while beat(one, "p0", registered.generation).wanted_role != "decode":
                pass
            flipped = register(one, "p0", "decode", previous=registered.generation)
            assert flipped.generation > registered.generation
            until(watch, lambda members: members["p0"].role == "decode")
            gone = ask(one, Deregister(next(numbers), "p0", flipped.generation))
            assert isinstance(gone, Done)
            until(watch, lambda members: "p0" not in members)


def test_of_two_registrations_at_once_one_has_the_name(
    pair: tuple[DaemonProcess, DaemonProcess],
) -> None:
    with DaemonClient(pair[0].address) as one, DaemonClient(pair[1].address) as two:
        generations = []
        for life in range(1, 11):
            for client in (one, two):
                answer = register(client, "same", life=life if client is one else -life % 1000)
                generations.append(answer.generation)
        assert generations == sorted(set(generations))
        for client in (one, two):
            with client.watch() as watch:
                until(watch, lambda members: members["same"].generation == generations[-1])
            stale = beat(client, "same", generations[-2])
            assert isinstance(stale, Denied)
            assert stale.reason == "generation"


def test_any_daemon_places_by_loads_that_another_was_told(
    pair: tuple[DaemonProcess, DaemonProcess],
) -> None:
    with DaemonClient(pair[0].address) as one, DaemonClient(pair[1].address) as two:
        busy = register(one, "busy-0", model="m")
        register(one, "idle-0", model="m")
        register(one, "taker", "decode", model="m")
        with two.watch() as watch:
            until(watch, lambda members: "taker" in members)
            queue = 0
            while watch.view.loads.get("busy-0", Load()).queued_tokens == 0:
                queue += 1000
                beat(one, "busy-0", busy.generation, Load(queued_tokens=queue))
                watch.poll(1.0)
        assert two.place(100, model="m").prefill == "idle-0"


def test_what_agents_do_is_told_by_all_daemons_together(
    mortal_pair: tuple[DaemonProcess, DaemonProcess],
) -> None:
    one, two = mortal_pair
    with (
        DaemonClient(one.address) as first,
        DaemonClient(two.address) as second,
        DaemonClient(f"{one.address},{two.address}") as both,
    ):

        def work(client: DaemonClient, name: str, generation: int, handoff: str) -> None:
            doing = Activity(age_s=1.0, live=(LiveHandoff(handoff, "decode", "p", 1, 1.0),))
            beat = Heartbeat(next(numbers), name, generation, activity=doing)
            assert isinstance(ask(client, beat), Beat)

        def under_way(client: DaemonClient) -> set[str]:
            return {row.handoff for row in client.show(WAIT_S).live}

        left = register(first, "left", "decode").generation
        right = register(second, "right", "decode").generation
        work(first, "left", left, "r-left")
        work(second, "right", right, "r-right")
        while under_way(both) != {"r-left", "r-right"}:
            pass
        two.kill()
        work(first, "right", right, "r-new")  # it goes to the other one
        while under_way(both) != {"r-left", "r-new"}:
            work(first, "right", right, "r-new")


def test_an_agent_goes_to_another_daemon_and_stays_the_same(
    pair: tuple[DaemonProcess, DaemonProcess],
) -> None:
    """Its daemon lives, and must not end the lease that another one renews now."""
    lease_s = 3.0
    with DaemonClient(pair[0].address) as one, DaemonClient(pair[1].address) as two:
        generation = register(one, "roams", lease_s=lease_s).generation
        with one.watch() as watch:
            beats = 0
            while beats < 12:  # two leases
                watch.poll(lease_s / 3)
                assert watch.view.members["roams"].generation == generation
                answer = beat(two, "roams", generation)
                assert isinstance(answer, Beat), answer
                beats += 1
            until(
                watch, lambda members: "roams" not in members
            )  # and two ends it, once it is silent


def test_an_agent_that_dies_is_gone_for_every_daemon(
    pair: tuple[DaemonProcess, DaemonProcess],
) -> None:
    with DaemonClient(pair[0].address) as one, DaemonClient(pair[1].address) as two:
        with one.watch() as here, two.watch() as there:
            register(one, "dies", lease_s=0.3)
            while "dies" in {member.name for member in one.look().members}:
                here.poll(WAIT_S)
            register(one, "later")  # whoever has heard of this has heard of that
            assert "dies" not in until(there, lambda members: "later" in members)
        answer = beat(two, "dies", 1)
        assert isinstance(answer, Denied)
        assert answer.reason == "unknown"


def test_a_daemon_that_dies_takes_with_it_only_who_stayed(
    mortal_pair: tuple[DaemonProcess, DaemonProcess],
) -> None:
    with DaemonClient(mortal_pair[0].address) as one, DaemonClient(mortal_pair[1].address) as two:
        kept = register(one, "kept", lease_s=3.0).generation
        register(one, "lost", lease_s=3.0)
        with two.watch() as watch:
            until(watch, lambda members: len(members) == 2)
            mortal_pair[0].kill()
            while "lost" in watch.view.members:
                assert isinstance(beat(two, "kept", kept), Beat)
                watch.poll(0.2)
            assert watch.view.members["kept"].generation == kept


def test_a_daemon_that_comes_late_or_again_knows_everything(
    mortal_pair: tuple[DaemonProcess, DaemonProcess],
) -> None:
    with DaemonClient(mortal_pair[0].address) as one, DaemonClient(mortal_pair[1].address) as two:
        generation = register(one, "p0").generation
        mortal_pair[1].kill()
        register(one, "p1")
        mortal_pair[1].start()
        two.look(timeout_s=WAIT_S)
        assert isinstance(beat(two, "p0", generation), Beat)
        assert {member.name for member in two.look().members} == {"p0", "p1"}


def test_while_the_store_is_away_agents_stay_and_nothing_changes(
    own_etcd: EtcdProcess, daemons: Daemons
) -> None:
    daemon = daemons.start(own_etcd.url)
    with DaemonClient(daemon.address) as client:
        generation = register(client, "p0").generation
        register(client, "d0", "decode")
        own_etcd.kill()
        while True:  # until the daemon has noticed
            beat(client, "p0", generation)
            there = Registration("p9", "prefill", 1, "tcp://127.0.0.1:9")
            answer = client.ask(Register(next(numbers), 1, there, 60.0), WAIT_S)
            assert not isinstance(answer, Registered)
            if isinstance(answer, Denied):
                assert answer.reason == "store"
                assert "etcd://127.0.0.1" in answer.detail
                break
        assert client.place(10).prefill == "p0"
        own_etcd.start()
        while True:
            assert isinstance(beat(client, "p0", generation), Beat)
            answer = client.ask(Register(next(numbers), 1, there, 60.0), WAIT_S)
            if isinstance(answer, Registered):
                break
        assert answer.generation > generation


def test_a_store_that_forgot_everything_is_filled_again(
    own_etcd: EtcdProcess, tmp_path: Path, daemons: Daemons
) -> None:
    daemon = daemons.start(own_etcd.url)
    with DaemonClient(daemon.address) as client:
        old = register(client, "p0").generation
        own_etcd.kill()
        own_etcd.folder = tmp_path / "new"
        own_etcd.folder.mkdir()
        (own_etcd.folder / "etcd.log").touch()
        own_etcd.start()
        while isinstance(beat(client, "p0", old), Beat):
            pass
        assert register(client, "p0", previous=old).generation > old


def test_an_agent_that_dies_while_the_store_is_away_is_gone_in_the_end(
    own_etcd: EtcdProcess, daemons: Daemons
) -> None:
    daemon = daemons.start(own_etcd.url)
    with DaemonClient(daemon.address) as client:
        with client.watch() as watch:
            register(client, "p0", lease_s=1.0)
            until(watch, lambda members: "p0" in members)
            own_etcd.kill()
            until(watch, lambda members: "p0" not in members)
        own_etcd.start()
        other = daemons.start(own_etcd.url)
        with DaemonClient(other.address) as late:
            register(late, "p1")
            with late.watch() as watch:
                until(watch, lambda members: set(members) == {"p1"})


def test_without_a_store_a_daemon_denies_by_name_and_goes_on_looking(
    own_etcd: EtcdProcess, daemons: Daemons
) -> None:
    own_etcd.kill()
    daemon = daemons.start(own_etcd.url)
    with DaemonClient(daemon.address) as client:
        there = Registration("p0", "prefill", 1, "tcp://127.0.0.1:9")
        answer = client.ask(Register(next(numbers), 1, there, 60.0), WAIT_S)
        assert isinstance(answer, Denied)
        assert answer.reason == "store"
        own_etcd.start()
        register(client, "p0")
        with pytest.raises(PlacementError):
            client.place(1)
