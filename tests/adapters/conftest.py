"""Agents of this process and of others, over every transport."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kvferry.engine.staging.thresholds import NEVER_DIRECT, DirectThresholds
from kvferry.engine.transfer_engine import TransferEngine
from tests.support.agent_process import Cache, Gate
from tests.support.agents import TRANSPORTS, Local, Remote

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    """Every transport in turn."""
    name: str = request.param
    return name


@pytest.fixture
def new_agent(transport: str) -> Iterator[Callable[..., Local]]:
    """Makes agents of this process."""
    made: list[Local] = []

    def make(
        name: str, role: str, num_blocks: int = 64, options: Any = None, **shape: int
    ) -> Local:
        cache = Cache(num_blocks, **shape)
        made.append(Local(name, role, transport, cache, **(options or {})))
        return made[-1]

    yield make
    for local in made:
        local.agent.close()


@pytest.fixture
def staging_engine(transport: str) -> Iterator[Callable[[str], TransferEngine]]:
    """Makes engines that stage every piece."""
    made: list[TransferEngine] = []

    def make(name: str) -> TransferEngine:
        paths = DirectThresholds(direct_from_nbytes={transport: NEVER_DIRECT})
        made.append(TransferEngine(name=name, transports=(transport,), paths=paths))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture(scope="session")
def spare() -> Iterator[list[Remote]]:
    """A process that starts while the test before runs: a start takes longer than most tests."""
    waiting = [Remote()]
    yield waiting
    for remote in waiting:
        remote.kill()
        remote.pipe.close()


@pytest.fixture
def start_agent(transport: str, spare: list[Remote]) -> Iterator[Callable[..., Remote]]:
    """Starts agents of other processes, which a test may freeze or kill."""
    started: list[Remote] = []

    def start(name: str, role: str, **options: Any) -> Remote:
        started.append(spare.pop())
        spare.append(Remote())
        started[-1].begin(name=name, role=role, transport=transport, **options)
        return started[-1]

    yield start
    for remote in started:
        remote.thaw()
        remote.end()


@pytest.fixture
def gate() -> Iterator[Gate]:
    """A gate before the bytes that this process moves."""
    gate = Gate()
    yield gate
    gate.open()
