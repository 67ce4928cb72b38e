"""The list of what was skipped, which every run of the tests ends with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvferry.tools.rdma_vm import missing

if TYPE_CHECKING:
    from tests import needs, skips
else:
    import needs  # in the folder above: `pythonpath` in pyproject.toml
    import skips

ROOT = Path(__file__).parent.parent.parent
TESTS = """
import pytest

@pytest.mark.parametrize("number", range(3))
def test_gpu(number):
    pytest.skip(f"needs a CUDA device; torch sees {number}")

@pytest.mark.skip(reason="needs a wheel: no network")
def test_wheel(): ...

@pytest.mark.xfail(strict=True)
def test_wrong(): assert False

def test_right(): ...
"""


@pytest.mark.parametrize("options", [[], ["-n", "2"]], ids=["one process", "side by side"])
def test_a_run_ends_with_what_was_skipped(tmp_path: Path, options: list[str]) -> None:
    """By the hook of these tests' own `conftest.py`."""
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *options, "test_some.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    _, _, tail = done.stdout.partition(" skipped -")
    gpu, wheel = tail.splitlines()[1:3]
    assert gpu.startswith("    3 needs a CUDA device; torch sees "), done.stdout
    assert wheel == "    1 needs a wheel: no network"


def test_the_list_is_short_and_the_most_frequent_come_first() -> None:
    reasons = [f"reason {number}: {'long ' * 60}" for number in range(20) for _ in range(number)]
    lines = list(skips.summary(reasons, []))
    assert len(lines) == skips.MOST_REASONS + 1
    assert lines[0].startswith("   19 reason 19: long")
    assert lines[-1] == "   66 for 11 other reasons; all of them: -rs"
    assert all(len(line) <= skips.WIDTH + 6 for line in lines)


def test_the_command_that_installs_is_named_where_it_would_help() -> None:
    etcd = "needs etcd: apt-get install etcd-server"
    assert list(skips.summary([etcd, etcd, "needs root"], ["etcd-server"]))[-1] == (
        "`make tools` installs what 2 of them need: etcd-server"
    )
    assert list(skips.summary(["needs root"], ["etcd-server"])) == ["    1 needs root"]
    assert list(skips.summary([etcd], [])) == [f"    1 {etcd}"]


def test_missing_packages_are_those_of_programs_that_are_not_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(needs, "find", lambda name: None if name == needs.CHROMIUM else name)
    monkeypatch.setattr(missing, "which", lambda name: None if name == "cpio" else name)
    monkeypatch.setattr(missing, "FILES", {})
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    wanted = ["chromium-headless-shell", "cpio", "fonts-dejavu-core"]
    assert needs.missing_packages() == wanted
    monkeypatch.setattr("platform.machine", lambda: "aarch64")  # where the machine never runs
    assert needs.missing_packages() == [name for name in wanted if name != "cpio"]
