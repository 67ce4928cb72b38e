"""Programs that some tests need: a skip that says which package has it, or a failure.

`KVFERRY_REQUIRE_TOOLS=1`, as continuous integration sets it, makes it a failure.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def need(program: str, package: str) -> str:
    """The path of a program, or of a file with this path; `package` is Debian's."""
    if program.startswith("/"):
        found = program if Path(program).exists() else None
    else:
        found = shutil.which(program) or shutil.which(program, path=SYSTEM_PATH)
    if found is None:
        lack(f"needs {program}: apt-get install {package}")
    return found


def need_network_namespaces() -> None:
    """What it takes to make another host of a network and a process namespace."""
    for program, package in (("ip", "iproute2"), ("unshare", "util-linux")):
        need(program, package)
    if os.geteuid() != 0:
        lack("network namespaces need root")


def lack(reason: str) -> NoReturn:
    """Skips this test, or fails it where nothing may be missing."""
    if os.environ.get("KVFERRY_REQUIRE_TOOLS"):
        pytest.fail(reason)
    pytest.skip(reason)
