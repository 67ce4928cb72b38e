"""`make map`: every folder, its lines, and its files with the first line that each says of itself.

    map.py [--lines] [folder ...]

With `--lines` a line a folder, as continuous integration prints it. Needs nothing that is installed.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
WINGS = ("engine", "kernels", "control", "adapters", "tools", "tests")


def lines_of(folder: Path) -> int:
    """Count the lines of the modules that lie in a folder itself."""
    return sum(len(path.read_text("utf-8").splitlines()) for path in folder.glob("*.py"))


def folders_of(wing: Path) -> Iterator[Path]:
    """Yield the folders with modules, each before those inside it."""
    for folder in (wing, *sorted(path for path in wing.rglob("*") if path.is_dir())):
        if any(folder.glob("*.py")):
            yield folder


def says(path: Path) -> str:
    """Read the first line of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    return text.partition("\n")[0] if text else ""


def main(arguments: list[str]) -> None:
    lines_only = "--lines" in arguments
    for wing in [name for name in arguments if name != "--lines"] or WINGS:
        folders = {folder: lines_of(folder) for folder in folders_of(ROOT / wing)}
        for folder, lines in folders.items():
            print(f"{lines:7,} {folder.relative_to(ROOT)}/")
            for path in () if lines_only else sorted(folder.glob("*.py")):
                print(f"        {path.name:24} {says(path)}")
        print(f"{sum(folders.values()):7,} in all of {wing}/")


if __name__ == "__main__":
    main(sys.argv[1:])
