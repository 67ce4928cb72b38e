"""`docs/structure.md` names every source file, and no file that is not there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("engine", "control", "kernels", "adapters", "tools")


def test_structure_names_every_file() -> None:
    text = (ROOT / "docs" / "structure.md").read_text()
    named = set()
    for folder in FOLDERS:
        section = text.split(f"\n## {folder}/\n", 1)[1].split("\n## ", 1)[0]
        named |= {
            f"{folder}/{name}" for name in re.findall(r"^\| `([\w/]+\.py)` \|", section, re.M)
        }
    there = {
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
    }
    assert named == there
