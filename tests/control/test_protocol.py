"""docs/protocol.md: its client runs, and it names every message, field of a request, and timeout."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from kvferry.control import daemon_messages, messages
from kvferry.control.client import DaemonClient
from tests.daemon_process import ROOT, DaemonProcess

TEXT = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
KINDS = [*messages.MESSAGE_TYPES, *daemon_messages.REQUEST_TYPES, *daemon_messages.ANSWER_TYPES]


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


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_message_is_named(kind: type) -> None:
    assert f"`{kind.__name__.lower()}`" in TEXT


@pytest.mark.parametrize("kind", daemon_messages.REQUEST_TYPES, ids=lambda kind: kind.__name__)
def test_every_field_of_a_request_is_named(kind: type[daemon_messages.Ask]) -> None:
    for field in set(kind.__struct_fields__) - {"request"}:
        assert f"`{field}`" in TEXT


def test_both_versions_are_those_of_the_code() -> None:
    assert f"use a DEALER | {messages.VERSION} |" in TEXT.replace("uses", "use")
    assert f"XPUB for changes | {daemon_messages.VERSION} |" in TEXT
