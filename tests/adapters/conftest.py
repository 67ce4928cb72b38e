"""Agents of this process and of others, over every transport."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest

from kvferry.engine.staging.thresholds import NEVER_DIRECT, Paths
from kvferry.engine.transfer_engine import TransferEngine
from kvferry.tools.pinned import CannotInstall
from kvferry.tools.vllm_cpu.environment import ensure

from .agent_process import Cache, Gate
from .agents import TRANSPORTS, Local, Remote
from .vllm_servers import run_nicely
from .vllm_steps import make_worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvferry.adapters.vllm.worker import WorkerSide
    from tests.needs import lack
else:
    from needs import lack  # in the folder above: `pythonpath` in pyproject.toml


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
        paths = Paths(direct_from_nbytes={transport: NEVER_DIRECT})
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


@pytest.fixture
def new_worker(transport: str) -> Iterator[Callable[..., WorkerSide]]:
    """Starts workers of the vLLM connector, each of one rank; see `make_worker`."""
    made: list[WorkerSide] = []

    def make(*arguments: Any, **options: Any) -> WorkerSide:
        made.append(make_worker(*arguments, transport=transport, **options))
        return made[-1]

    yield make
    for worker in made:
        worker.close()


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The Python of an environment with vLLM for CPUs."""
    try:
        return str(ensure())
    except CannotInstall as error:
        lack(f"needs vLLM, which cannot be installed here: {error}")


@pytest.fixture(scope="session")
def model(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Makes a model of that kind, once."""

    @functools.cache
    def make(kind: str) -> str:
        folder = tmp_path_factory.mktemp(kind)
        command = [vllm_python, "-m", "kvferry.tools.vllm_cpu.models", str(folder), kind]
        run_nicely(command, folder / "log.txt")
        return str(folder)

    return make
