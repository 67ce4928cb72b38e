"""deploy/: the settings are settings, and the daemon runs on what the container installs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest

from kvferry.control.curve import new_pair
from kvferry.control.daemon.settings import Settings, load_keys, read_settings
from kvferry.control.errors import ConfigError, InsecureAddress
from kvferry.control.keys import Keys, write_keys
from tests import ROOT
from tests.support.requirements import lack

if TYPE_CHECKING:
    from collections.abc import Iterator

DEPLOY = ROOT / "deploy"
CONTAINER_USER = 65534
# With everything loaded, since another user may not be let into this checkout or this Python.
LOAD_AS = f"""
import os, sys
from kvferry.control.errors import ConfigError
from kvferry.control.keys import Keys
Keys.load(sys.argv[1])
os.setgroups([])
os.setresgid(*3 * [{CONTAINER_USER}])
os.setresuid(*3 * [{CONTAINER_USER}])
try:
    print(Keys.load(sys.argv[2]).public.hex())
except ConfigError as error:
    print(error)
"""


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


@pytest.fixture
def credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A key as systemd hands it over: its folder, and its file with the bits of an access list."""
    folder = tmp_path / "credentials"
    write_keys(folder / "daemon.key", *new_pair())
    (folder / "daemon.key").chmod(0o440)
    folder.chmod(0o550)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    return folder


def test_the_unit_names_the_credential_that_it_loads() -> None:
    text = (DEPLOY / "kvferry-daemon.service").read_text()
    (credential,) = re.findall(r"^LoadCredential=(.*):/etc/kvferry/", text, re.M)
    assert f"Environment=KVFERRY_DAEMON_KEYS=%d/{credential}\n" in text


def test_a_credential_of_systemd_is_a_key(credentials: Path) -> None:
    assert Keys.load(credentials / "daemon.key").secret


@pytest.mark.parametrize("mode", [0o444, 0o460, 0o404])
def test_a_credential_that_others_reach_is_none(credentials: Path, mode: int) -> None:
    (credentials / "daemon.key").chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        Keys.load(credentials / "daemon.key")


def test_a_credential_in_an_open_folder_is_none(credentials: Path) -> None:
    credentials.chmod(0o755)
    with pytest.raises(ConfigError, match="chmod 600"):
        Keys.load(credentials / "daemon.key")


def test_what_a_group_can_read_elsewhere_is_refused(
    credentials: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = credentials.with_name("other")
    other.mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(other))
    with pytest.raises(ConfigError, match="chmod 600"):
        Keys.load(credentials / "daemon.key")
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    with pytest.raises(ConfigError, match="chmod 600"):
        Keys.load(credentials / "daemon.key")


def test_the_container_runs_as_whom_its_commands_map() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    assert re.findall(r"^USER (\d+):", text, re.M) == [str(CONTAINER_USER)]
    assert f"--userns=keep-id:uid={CONTAINER_USER},gid={CONTAINER_USER}" in text


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter."""
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "not mapped"])
def test_the_containers_user_reads_keys_that_are_its_own(open_folder: Path, mapped: bool) -> None:
    """What `--userns=keep-id` changes is whose the files are, for the process inside."""
    if os.geteuid() != 0:
        lack("becoming the container's user needs root")
    write_keys(open_folder / "mine.key", *new_pair())
    public, secret = new_pair()
    write_keys(open_folder / "daemon.key", public, secret)
    if mapped:
        os.chown(open_folder / "daemon.key", CONTAINER_USER, CONTAINER_USER)
    files = [str(open_folder / name) for name in ("mine.key", "daemon.key")]
    script = [sys.executable, "-c", LOAD_AS, *files]
    found = subprocess.run(script, capture_output=True, text=True, check=True, timeout=60)
    if mapped:
        assert found.stdout == f"{public.hex()}\n"
    else:
        assert f"cannot be read by user {CONTAINER_USER}, it belongs to user 0" in found.stdout
        assert "--userns=keep-id" in found.stdout
