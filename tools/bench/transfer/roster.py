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

PEERS = ("nixl", "mooncake")  # as they are imported
MEMCPY, SOCKET, CMA, CMA_VERIFIED = "memcpy", "socket", "cma", "cma-verify"
VM = "process_vm"
NIXL, NIXL_TCP, MOONCAKE = "nixl", "nixl-tcp", "mooncake-tcp"
VERIFIED_RAILS = 2


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
        driver: `file:class` in `drivers/`.
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
    """Return the key of kvferry's tcp with so many rails."""
    return f"tcp-{rails}" + ("-verify" if verify else "")


def roster(rails: tuple[int, ...], peers: tuple[str, ...], peer_python: str) -> list[Contender]:
    """Everybody, in the order of the tables."""
    ways, write = (INDEX, TAKE, LIBC), (WRITE,)
    found = [
        Contender(MEMCPY, "memcpy", "memcpy:MemcpyDriver", {}, ways, ways, alone=True),
        Contender(SOCKET, "plain Python socket", "plain_socket:SocketDriver", {}, write),
    ]
    for number in (1, 2):
        name, options = f"process_vm, {_many(number, 'thread')}", {"threads": number}
        found.append(Contender(f"{VM}-{number}", name, "process_vm:VmDriver", options, write))
    found.append(_ours(CMA, "cma", transport="cma"))
    for number in rails:
        name = f"tcp, {_many(number, 'rail')}"
        found.append(_ours(tcp_key(number), name, transport="tcp", rails=number))
    tcp = {"transport": "tcp", "rails": VERIFIED_RAILS}
    found += [
        _ours(CMA_VERIFIED, "cma, verify", verify=True, transport="cma"),
        _ours(tcp_key(VERIFIED_RAILS, verify=True), "tcp, verify", verify=True, **tcp),
    ]
    for package, key, label, driver, tls in (
        ("nixl", NIXL, "NIXL, default (CMA)", "nixl:NixlDriver", {}),
        ("nixl", NIXL_TCP, "NIXL, tcp", "nixl:NixlDriver", {"ucx_tls": "tcp,self"}),
        ("mooncake", MOONCAKE, "Mooncake, tcp", "mooncake:MooncakeDriver", {}),
    ):
        if package in peers:
            packages = (package,)
            found.append(
                Contender(key, label, driver, tls, python=peer_python, packages=packages, peer=True)
            )
    return found


def installed_peers(python: str) -> tuple[str, ...]:
    """Return which peers an interpreter could import, without importing them.

    Raises:
        OSError: there is no such interpreter.
    """
    code = "import importlib.util as u, sys\nprint(*(p for p in sys.argv[1:] if u.find_spec(p)))"
    found = subprocess.run(
        [python, "-I", "-c", code, *PEERS], capture_output=True, text=True, check=False
    )
    return tuple(peer for peer in PEERS if peer in found.stdout.split())


def _ours(key: str, label: str, *, verify: bool = False, **options: Any) -> Contender:
    return Contender(
        key,
        f"kvferry {label}",
        "kvferry:KvferryDriver",
        {"verify": verify} | options,
        operations=(WRITE,) if verify else (WRITE, READ),
        elsewhere=() if verify else (WRITE,),
    )


def _many(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number > 1)}"
