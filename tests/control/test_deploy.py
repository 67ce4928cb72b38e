"""deploy/: the settings are settings, and the daemon runs on what the container installs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from kvferry.control.errors import InsecureAddress
from kvferry.control.settings import Settings, load_keys, read_settings
from tests.daemon_process import ROOT

if TYPE_CHECKING:
    from pathlib import Path

DEPLOY = ROOT / "deploy"


def test_the_example_settings_are_settings_and_ask_for_keys() -> None:
    settings = read_settings(["--config", str(DEPLOY / "daemon.toml")], {})
    with pytest.raises(InsecureAddress):
        load_keys(settings)


@pytest.mark.parametrize("name", ["kvferry-daemon.service", "Containerfile"])
def test_every_variable_is_a_setting(name: str) -> None:
    found = re.findall(r"KVFERRY_DAEMON_([A-Z_]+)=", (DEPLOY / name).read_text())
    assert found
    assert {variable.lower() for variable in found} <= set(Settings.__struct_fields__)


def test_what_the_container_copies_is_enough(tmp_path: Path) -> None:
    """The copied files start a daemon that loads nothing but what the container installs."""
    text = (DEPLOY / "Containerfile").read_text()
    for source, target in re.findall(r"^COPY (\S+) /app/(\S+)$", text, re.M):
        (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, tmp_path / target)
    script = (
        "import sys, kvferry.control.__main__\n"
        "third = {n.partition('.')[0] for n, m in sys.modules.items()"
        " if 'site-packages' in (getattr(m, '__file__', None) or '')}\n"
        "print(kvferry.__file__, *sorted(third))"
    )
    found = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    where, *third = found.stdout.split()
    assert where.startswith(str(tmp_path))
    installed = re.findall(r"pip install --no-cache-dir (.*)$", text, re.M)[0].split()
    # Present here, and optional: an installer's hook, and what msgspec uses if it is there.
    third = [name for name in third if name not in ("_distutils_hack", "typing_extensions")]
    assert set(third) <= {"zmq" if name == "pyzmq" else name for name in installed}
