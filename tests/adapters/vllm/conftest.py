"""Workers of the vLLM connector, and environments and models for real engines."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest

from kvferry.tools.pinned import CannotInstall
from kvferry.tools.vllm_cpu.environment import ensure
from tests.adapters.vllm.servers import run_nicely
from tests.support.requirements import lack
from tests.support.vllm_steps import make_worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvferry.adapters.vllm.worker import WorkerSide


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
