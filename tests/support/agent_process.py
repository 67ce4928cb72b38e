"""An agent in a process of its own, behind a command loop; and the cache that both ends use.

Started by `tests/adapters/conftest.py` with the number of an inherited pipe. Takes the agent's
options, then `(command, arguments, options)`; answers `(ok, value or exception)`. Imports no torch.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from kvferry.adapters.agent.agent import Agent
from kvferry.engine.layout.kv_layout import KVLayout
from kvferry.engine.memory import iovec
from tests.support.child import pipe_of_child, serve

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from kvferry.adapters.agent.handoff import Pending

NUM_LAYERS = 3
TOKENS, DIM = 4, 16
SENTINEL = 0xA5
# Reached only when something hangs; `verbs` is tested in an emulated machine.
WAIT_S = 120.0 if os.environ.get("KVFERRY_TEST_TRANSPORTS") == "verbs" else 30.0


class Cache:
    """A paged cache of bytes: layer by layer, `[plane, block, token, head, dim]`, NHD."""

    def __init__(
        self, num_blocks: int, heads: int = 2, tokens: int = TOKENS, dim: int = DIM
    ) -> None:
        shape = (2, num_blocks, tokens, heads, dim)
        self.layers = [np.full(shape, SENTINEL, np.uint8) for _ in range(NUM_LAYERS)]
        self.layout = KVLayout.from_tensors(self.layers, "plane block token head dim")
        self.block_nbytes = self.layout.block_nbytes

    def fill(self, block_ids: Sequence[int], seed: int, layers: range | None = None) -> None:
        """Random content for these blocks: the i-th is alike wherever it lies."""
        for layer in range(NUM_LAYERS):
            content = self.content(len(block_ids), seed, layer)
            if layer in (layers or range(NUM_LAYERS)):
                self.layers[layer][:, list(block_ids)] = content

    def content(self, num_blocks: int, seed: int, layer: int) -> npt.NDArray[np.uint8]:
        shape = (2, num_blocks, *self.layers[0].shape[2:])
        return np.random.default_rng([seed, layer]).integers(0, 256, shape, np.uint8)

    def holds(self, block_ids: Sequence[int], seed: int) -> bool:
        """Whether these blocks have that content."""
        return all(
            np.array_equal(
                self.layers[layer][:, list(block_ids)], self.content(len(block_ids), seed, layer)
            )
            for layer in range(NUM_LAYERS)
        )

    def touched(self) -> list[int]:
        """Blocks with a byte that is not the sentinel."""
        changed = [(layer != SENTINEL).any(axis=(0, 2, 3, 4)) for layer in self.layers]
        return [int(block) for block in np.flatnonzero(np.logical_or.reduce(changed))]


class Gate:
    """Holds bytes back just before they move; `reached` is set once a thread waits at it."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()
        self._functions = {name: getattr(iovec, name) for name in ("process_vm", "send", "receive")}

    def close(self) -> None:
        """From now on nothing that this process moves gets through."""
        self.reached.clear()
        self._open.clear()
        for name, function in self._functions.items():
            setattr(iovec, name, self._guard(function))

    def open(self) -> None:
        self._open.set()
        for name, function in self._functions.items():
            setattr(iovec, name, function)

    def _guard(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any, **options: Any) -> Any:
            self.reached.set()
            assert self._open.wait(WAIT_S), "nobody opened the gate"
            return function(*arguments, **options)

        return guarded


class Commands:
    """What a test can make the agent do: every public method is a command."""

    def __init__(
        self,
        name: str,
        role: str,
        transport: str,
        num_blocks: int = 64,
        heads: int = 2,
        tokens: int = TOKENS,
        dim: int = DIM,
        **options: Any,
    ) -> None:
        self._cache = Cache(num_blocks, heads, tokens, dim)
        self._gate = Gate()
        self._handoffs: list[Any] = []
        self._agent = Agent(
            name=name,
            role=role,  # type: ignore[arg-type]
            layout=self._cache.layout,
            tensors=self._cache.layers,
            transports=(transport,),
            **options,
        )

    def address(self) -> str:
        return self._agent.address

    def connect(self, address: str) -> str:
        return self._agent.connect(address)

    def wait_for_member(self, name: str) -> None:
        self._agent.wait_for_member(name, WAIT_S)

    def fill(self, block_ids: list[int], seed: int) -> None:
        self._cache.fill(block_ids, seed)

    def holds(self, block_ids: list[int], seed: int) -> bool:
        return self._cache.holds(block_ids, seed)

    def touched(self) -> list[int]:
        return self._cache.touched()

    def receive(self, *arguments: Any, **options: Any) -> int:
        return self._keep(self._agent.receive(*arguments, **options))

    def send(self, *arguments: Any, **options: Any) -> int:
        return self._keep(self._agent.send(*arguments, **options))

    def open_send(self, *arguments: Any, **options: Any) -> int:
        return self._keep(self._agent.open_send(*arguments, **options))

    def write_layers(self, handoff: int, layers: range) -> None:
        self._handoffs[handoff].write_layers(layers)

    def wait(self, handoff: int, timeout_s: float = WAIT_S) -> int:
        return self._handoffs[handoff].wait(timeout_s)  # type: ignore[no-any-return]

    def done(self, handoff: int) -> bool:
        return self._handoffs[handoff].done()  # type: ignore[no-any-return]

    def wait_for_blocks(self, handoff: int, timeout_s: float = WAIT_S) -> None:
        self._handoffs[handoff].blocks_free.wait(timeout_s)

    def cancel(self, handoff: int) -> None:
        self._handoffs[handoff].cancel()

    def settle(self) -> None:
        """Returns once the agent's thread has done what it was told before."""
        handoff = self._agent.send("nobody asks for this", [0])
        handoff.cancel()
        handoff.blocks_free.wait(WAIT_S)

    def close_gate(self) -> None:
        self._gate.close()

    def reach_gate(self) -> bool:
        return self._gate.reached.wait(WAIT_S)

    def open_gate(self) -> None:
        self._gate.open()

    def close(self) -> None:
        self._agent.close()

    def _keep(self, handoff: Pending) -> int:
        self._handoffs.append(handoff)
        return len(self._handoffs) - 1


def main() -> None:
    pipe = pipe_of_child()
    try:
        commands = Commands(**pipe.recv())
    except EOFError:
        return  # no test needed it
    except Exception as error:
        pipe.send((False, error))
        raise
    pipe.send((True, None))
    serve(pipe, commands)


if __name__ == "__main__":
    main()
