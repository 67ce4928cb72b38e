"""Who takes part in `kvferry bench transfer`, in which shapes, and how each is started."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any, NamedTuple

from kvferry.tools.bench.transfer.driver import READ, WRITE
from kvferry.tools.bench.transfer.drivers.memcpy import INDEX, LIBC, TAKE
from kvferry.tools.bench.transfer.workload import (
    CONTIGUOUS,
    LARGE_BLOCKS,
    SMALL_BLOCKS,
    SMALL_HANDOFF,
    Shape,
)

PEERS = ("nixl", "mooncake")
MEMCPY, SOCKET, CMA, CMA_VERIFIED = "memcpy", "socket", "cma", "cma-verify"
VM = "process_vm"
NIXL, NIXL_TCP, MOONCAKE = "nixl", "nixl-tcp", "mooncake-tcp"
VERIFIED_RAILS = 2

_HERE = "kvferry.tools.bench.transfer.drivers"
_MODULES = {"nixl": "nixl", "mooncake": "mooncake"}


class Shapes(NamedTuple):
    """The shapes of one run, by what they are for."""

    large_blocks: Shape = LARGE_BLOCKS
    small_blocks: Shape = SMALL_BLOCKS
    one_piece: Shape = CONTIGUOUS
    small_handoff: Shape = SMALL_HANDOFF


@dataclasses.dataclass(frozen=True, eq=False)
class Contender:
    """One library in one configuration: a pair of processes.

    Attributes:
        key: its name in results.
        label: its name for people.
        operations: what it does with the large blocks.
        elsewhere: what it does with the other shapes.
        peer: whether it is another library; those are frozen while others are measured.
    """

    key: str
    label: str
    driver: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    operations: tuple[str, ...] = (WRITE, READ)
    elsewhere: tuple[str, ...] = (WRITE,)
    python: str = sys.executable
    packages: tuple[str, ...] = ()
    alone: bool = False
    peer: bool = False


def tcp_key(rails: int, *, verify: bool = False) -> str:
    """The key of kvferry's tcp with so many rails."""
    return f"tcp-{rails}" + ("-verify" if verify else "")


def roster(rails: tuple[int, ...], peers: tuple[str, ...], peer_python: str) -> list[Contender]:
    """Everybody, in the order of the tables."""
    ways = (INDEX, TAKE, LIBC)
    return [
        Contender(
            MEMCPY,
            "memcpy",
            f"{_HERE}.memcpy:MemcpyDriver",
            operations=ways,
            elsewhere=ways,
            alone=True,
        ),
        Contender(
            SOCKET,
            "plain Python socket",
            f"{_HERE}.plain_socket:SocketDriver",
            operations=(WRITE,),
        ),
        *(
            Contender(
                f"{VM}-{threads}",
                f"process_vm, {threads} thread{'s' if threads > 1 else ''}",
                f"{_HERE}.process_vm:VmDriver",
                options={"threads": threads},
                operations=(WRITE,),
            )
            for threads in (1, 2)
        ),
        _ours(CMA, "kvferry cma", transport="cma"),
        *(
            _ours(
                tcp_key(number),
                f"kvferry tcp, {number} rail{'s' if number > 1 else ''}",
                transport="tcp",
                rails=number,
            )
            for number in rails
        ),
        _ours(CMA_VERIFIED, "kvferry cma, verify", transport="cma", verify=True),
        _ours(
            tcp_key(VERIFIED_RAILS, verify=True),
            "kvferry tcp, verify",
            transport="tcp",
            rails=VERIFIED_RAILS,
            verify=True,
        ),
        *(each for each in _peers(peer_python) if each.key.split("-")[0] in peers),
    ]


def installed_peers(python: str) -> tuple[str, ...]:
    """Which peers an interpreter could import, without importing them.

    Raises:
        OSError: there is no such interpreter.
    """
    code = "import importlib.util as u, sys\nprint(*(p for p in sys.argv[1:] if u.find_spec(p)))"
    found = subprocess.run(
        [python, "-I", "-c", code, *_MODULES.values()], capture_output=True, text=True, check=False
    )
    return tuple(peer for peer in PEERS if _MODULES[peer] in found.stdout.split())


def _ours(key: str, label: str, *, verify: bool = False, **options: Any) -> Contender:
    return Contender(
        key,
        label,
        f"{_HERE}.kvferry:KvferryDriver",
        options={"verify": verify} | options,
        operations=(WRITE,) if verify else (WRITE, READ),
        elsewhere=() if verify else (WRITE,),
    )


def _peers(python: str) -> list[Contender]:
    nixl, mooncake = f"{_HERE}.nixl:NixlDriver", f"{_HERE}.mooncake:MooncakeDriver"
    return [
        Contender(NIXL, "NIXL, default (CMA)", nixl, python=python, packages=("nixl",), peer=True),
        Contender(
            NIXL_TCP,
            "NIXL, tcp",
            nixl,
            options={"ucx_tls": "tcp,self"},
            python=python,
            packages=("nixl",),
            peer=True,
        ),
        Contender(
            MOONCAKE,
            "Mooncake, tcp",
            mooncake,
            python=python,
            packages=("mooncake",),
            peer=True,
        ),
    ]
