"""`make map`: every module is on it, with what it says of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvferry.tools import map as house_map
from tests import ROOT

if TYPE_CHECKING:
    import pytest


def test_every_file_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    house_map.main([])
    shown = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    files = [line for line in shown if line[0].endswith(".py")]
    paths = [path for wing in house_map.WINGS for path in (ROOT / wing).rglob("*.py")]
    assert len(files) == len(paths)
    assert not [name for name, *text in files if not text]


def test_lines_are_counted_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    house_map.main(["--lines", "kernels", "control"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(" kernels/")
    assert lines[1] == lines[0].replace("kernels/", "in all of kernels/")
    counts = [int(line.split()[0].replace(",", "")) for line in lines[2:]]
    assert sum(counts[:-1]) == counts[-1] > 4000
