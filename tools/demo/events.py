"""What the demo's processes tell each other: plain data, pickled over pipes of one host."""

from __future__ import annotations

from typing import NamedTuple


class Options(NamedTuple):
    """One run of the demo.

    Attributes:
        transports: names, in the order of the table.
        skip_unavailable: leave a transport out that this machine refuses, instead of failing.
        num_prompts, num_tokens: how many prompts, and greedy tokens after each.
        corrupt: flip bits of one received block a transport: the tokens must notice.
        silence_s: how long both workers may tell nothing before they count as stuck.
        deadline_s: how long one worker waits for the other, which may be computing.
        devices: where prefill and decode compute and keep their pools.
    """

    transports: tuple[str, ...]
    skip_unavailable: bool = True
    num_prompts: int = 64
    num_tokens: int = 32
    corrupt: bool = False
    silence_s: float = 60.0
    deadline_s: float = 600.0
    devices: tuple[str, str] = ("cpu", "cpu")


class Started(NamedTuple):
    """A process runs."""

    role: str
    pid: int


class Ready(NamedTuple):
    """A process has its model, its pool and its agents."""

    role: str


class Skipped(NamedTuple):
    """A transport does not work on this machine."""

    transport: str
    reason: str


class Prefilled(NamedTuple):
    """The prefill process has computed a prompt and exported its cache."""

    prompt: int
    num_tokens: int
    prefill_s: float


class Received(NamedTuple):
    """One handoff is complete: from asking for the request to its last byte counted."""

    transport: str
    prompt: int
    nbytes: int
    latency_s: float


class Step(NamedTuple):
    """One token more for each of some prompts; `path` is `reference` or a transport."""

    path: str
    num_prompts: int


class Generated(NamedTuple):
    """All tokens of some prompts; `path` is `reference` or a transport."""

    path: str
    tokens: dict[int, list[int]]


class Finished(NamedTuple):
    """A process is done, with the state of its pool."""

    role: str
    num_blocks: int
    num_free: int
    stray_blocks: int


class Failed(NamedTuple):
    """A process cannot go on."""

    role: str
    message: str


Event = Started | Ready | Skipped | Prefilled | Received | Step | Generated | Finished | Failed


# Between the two workers.


class Addresses(NamedTuple):
    """Where the prefill process's agents are, by transport, and why some are missing."""

    agents: dict[str, str]
    unavailable: dict[str, str]


class Connected(NamedTuple):
    """The transports over which decode reached prefill."""

    transports: tuple[str, ...]


class Computed(NamedTuple):
    """The KV of these prompts is in prefill's pool: ask for it."""

    prompts: range
