"""docs/protocol.md: its client runs, and it names every message, field, state, timeout and limit."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from typing import TYPE_CHECKING, get_args

import msgspec
import pytest

from kvferry.control.cluster import membership, store
from kvferry.control.cluster import messages as daemon_messages
from kvferry.control.cluster.client import DaemonClient
from kvferry.control.handoff import messages
from kvferry.engine.connect import handshake
from kvferry.engine.layout import kv_layout as layout
from kvferry.engine.layout import region
from kvferry.engine.memory import descriptors
from kvferry.engine.transports.verbs import cards as verbs_cards
from kvferry.engine.wire import identity
from kvferry.engine.wire import messages as wire
from tests import ROOT
from tests.support.daemon_process import DaemonProcess

from .protocol_document import (
    TEXT,
    documented_fields,
    documented_numbers,
    element_types_of,
    fields_of,
    parts_of,
    sections,
    tag_of,
    without_fields,
)

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    Kind = type[msgspec.Struct]

SECTIONS = sections()
LINK_MESSAGES: tuple[Kind, ...] = get_args(wire.LinkMessage)
# What the tables call those that have no name on the wire.
TITLES: dict[Kind, str] = {
    messages.Message: "every message",
    messages.HandoffMessage: "about a handoff",
    daemon_messages.Ask: "every request and answer",
}
KINDS: dict[str, tuple[Kind, ...]] = {
    "Agent and agent": (
        *(messages.Message, messages.HandoffMessage, messages.HandoffId),
        *get_args(messages.AnyMessage),
        *(descriptors.CacheDescriptor, descriptors.RegionDescriptor, descriptors.CudaMemory),
        *(layout.KVLayout, region.RegionLayout, region.Axis, layout.GroupLayout, layout.Scale),
    ),
    "Agent and daemon": (
        daemon_messages.Ask,
        *get_args(daemon_messages.AnyRequest),
        *get_args(daemon_messages.AnyAnswer),
        *(membership.Record, store.Peer),
    ),
    "Engine and engine": (
        *(identity.EngineAddress, identity.Identity, handshake.Hello, handshake.Challenge),
        *(handshake.Introduction, handshake.Proof, handshake.Welcome, handshake.Confirm),
        *LINK_MESSAGES,
        *(verbs_cards.Offer, verbs_cards.RailCard, verbs_cards.QueueCard, verbs_cards.GidCard),
    ),
}
MODULES = (messages, daemon_messages, handshake, wire, verbs_cards, descriptors, layout, region)
NUMBERS = documented_numbers(TEXT)
SECONDS = r"(?!.*PER_S$).*_(S|MS)"
NOT_OF_THE_PROTOCOL = {
    "daemon.daemon.TURN_S": "how long requests are taken before leases are looked at",
    "daemon.daemon.COMPLAIN_S": "how often the log has a traceback",
    "agent.arguments.SOON_S": "what a deadline that has passed becomes",
    "agent.executor.NEVER_S": "no timeout",
    "transfer.compute_gate.POLL_S": "how a thread waits for its own GPU",
    "memory.cuda_driver.ASK_AGAIN_S": "how a thread waits for its own GPU",
    "memory.cuda_driver.PATIENCE_S": "how a thread waits for its own GPU",
    "cuda_ipc.lane.LINGER_S": "how a thread waits for its own GPU",
    "cuda_ipc.lane.LOOK_S": "how a thread waits for its own GPU",
}
COUNTS = r"MAX_(?!LEASE_S).*|([A-Z]+_)?REMEMBERED|QUEUE_MESSAGES|BATCH_PARTS"
FILES_WITH_LIMITS = (
    *(
        f"control/handoff/{name}.py"
        for name in (
            "messages",
            "machine",
            "registry",
            "ledger",
        )
    ),
    *(
        f"control/cluster/{name}.py"
        for name in (
            "messages",
            "membership",
            "replication",
            "view",
        )
    ),
    *(f"control/{name}.py" for name in ("wire",)),
    *(f"control/daemon/{name}.py" for name in ("daemon",)),
    *(
        f"adapters/agent/{name}.py"
        for name in (
            "messaging",
            "sessions",
            "agent",
        )
    ),
    *(
        f"engine/wire/{name}.py"
        for name in (
            "messages",
            "tables",
            "channel",
            "frames",
        )
    ),
    *(f"engine/connect/{name}.py" for name in ("handshake", "listener")),
    *(f"engine/transfer/{name}.py" for name in ("counters",)),
    "engine/transports/segments.py",
    "engine/transports/cma/path.py",
    *(f"engine/transports/verbs/{name}.py" for name in ("cards",)),
)


def with_parts(kinds: tuple[Kind, ...]) -> list[Kind]:
    """These structs, and those that their fields hold."""
    found = list(kinds)
    for kind in found:  # which grows
        found += [part for part in parts_of(kind) if part not in found]
    return found


FIELDS = [(section, kind) for section, kinds in KINDS.items() for kind in with_parts(kinds)]


def test_the_client_in_the_document_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    daemon = DaemonProcess()
    try:
        found = subprocess.run(
            [sys.executable, "-c", code, daemon.address],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert found.stdout.startswith("plain decode tcp://127.0.0.1:9 ")
        with DaemonClient(daemon.address) as client:
            assert [member.name for member in client.look().members] == ["plain"]
    finally:
        daemon.end()


@pytest.mark.parametrize("section", KINDS)
def test_all_structs_and_no_others_are_there(section: str) -> None:
    wanted = [TITLES.get(kind, tag_of(kind)) for kind in with_parts(KINDS[section])]
    assert sorted(documented_fields(SECTIONS[section])) == sorted(wanted)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_no_struct_is_forgotten_above(module: ModuleType) -> None:
    there = [kind for kind in vars(module).values() if isinstance(kind, type)]
    own = {kind for kind in there if kind.__module__ == module.__name__ and is_struct(kind)}
    assert own <= {kind for _, kind in FIELDS}


def is_struct(kind: type) -> bool:
    return issubclass(kind, msgspec.Struct) and not kind.__name__.startswith("_")


@pytest.mark.parametrize(
    ("section", "kind"), FIELDS, ids=lambda value: getattr(value, "__name__", value)
)
def test_every_field_with_its_type_and_default(section: str, kind: Kind) -> None:
    found = documented_fields(SECTIONS[section])[TITLES.get(kind, tag_of(kind))]
    assert found == fields_of(kind)


@pytest.mark.parametrize("section", KINDS)
def test_every_message_is_explained_outside_the_tables_of_fields(section: str) -> None:
    prose = without_fields(SECTIONS[section])
    for kind in KINDS[section]:
        if kind not in TITLES and kind.__struct_config__.tag:
            assert f"`{tag_of(kind)}`" in prose


def test_every_state_is_named() -> None:
    for path in sorted((ROOT / "control").rglob("*.py")):
        module = import_module(".".join(("kvferry", *path.relative_to(ROOT).with_suffix("").parts)))
        for name in re.findall(r"self\.state = ([A-Z]+)$", path.read_text("utf-8"), re.M):
            assert f"`{getattr(module, name)}`" in TEXT, f"{path.stem}: {name}"


def test_every_timeout_with_its_default() -> None:
    # vLLM's and SGLang's adapters have timeouts of their own, in the documents about them.
    folders = ("control", "engine", "adapters/agent")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    documented = {name: value for name, value in NUMBERS.items() if value.endswith(" s")}
    in_the_code = numbers_in(paths, SECONDS)
    assert in_the_code.keys() >= NOT_OF_THE_PROTOCOL.keys()
    assert documented == {n: v for n, v in in_the_code.items() if n not in NOT_OF_THE_PROTOCOL}


def test_every_limit() -> None:
    documented = {name: value for name, value in NUMBERS.items() if not value.endswith(" s")}
    assert documented == numbers_in([ROOT / name for name in FILES_WITH_LIMITS], COUNTS)


def numbers_in(paths: list[Path], pattern: str) -> dict[str, str]:
    return {
        name: value for path in paths for name, value in element_types_of(path, pattern).items()
    }


def test_all_versions_are_those_of_the_code() -> None:
    assert f"use a DEALER | {messages.VERSION} |" in TEXT.replace("uses", "use")
    assert f"XPUB for changes | {daemon_messages.VERSION} |" in TEXT
    assert f"its transport needs besides | {wire.LINK_VERSION} |" in TEXT
