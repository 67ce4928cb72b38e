"""Compares what `.venv` has with constraints; the set-up script runs it by the Python of `.venv`.

Nothing but pip and the standard library: it is to say what is wrong with all the rest.
"""

from __future__ import annotations

import importlib.metadata
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pip._vendor.packaging.specifiers import SpecifierSet

OURS = "kvferry"


def pins(text: str, environment: Mapping[str, str] | None = None) -> dict[str, SpecifierSet]:
    """Read constraints, as far as they are for this Python and platform (or for `environment`)."""
    found = {}
    for line in text.splitlines():
        line = line.partition("#")[0].strip()
        if line:
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate(dict(environment or {})):
                found[str(canonicalize_name(pin.name))] = pin.specifier
    return found


def installed() -> dict[str, str]:
    """What this environment's own folders hold: not what it sees in the Python it was made from."""
    folders = list({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    return {
        str(canonicalize_name(found.metadata["Name"])): found.version
        for found in importlib.metadata.distributions(path=folders)
    }


def differences(have: Mapping[str, str], pinned: Mapping[str, SpecifierSet]) -> Iterator[str]:
    """Yield `name version pin` for what is at another version, or `name version unpinned`.

    A build of a pinned version (2.13.0+cpu) is that version.
    """
    for name, version in sorted(have.items()):
        if name == OURS:
            continue
        if name not in pinned:
            yield f"{name} {version} unpinned"
        elif not pinned[name].contains(version, prereleases=True):
            yield f"{name} {version} {str(pinned[name]).lstrip('=')}"


if __name__ == "__main__":
    constraints = Path(sys.argv[1]).read_text(encoding="utf-8")
    for difference in differences(installed(), pins(constraints)):
        print(difference)
