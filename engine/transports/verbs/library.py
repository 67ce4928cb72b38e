"""Finds pyverbs, whatever brought it: the package index (57 and newer) or a Linux distribution.

pyverbs is bound to the rdma-core of its version. The package index's needs that version installed at
run time; Debian's and Ubuntu's fits by construction but lies outside a virtual environment, so it is
loaded from there by its path, alone: no other package of that folder becomes importable.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

DISTRIBUTION_FOLDERS = (
    "/usr/lib/python3/dist-packages",  # Debian, Ubuntu
    f"/usr/lib64/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages",  # Fedora, RHEL
)
OLDEST, NEWEST = 44, 59  # rdma-core versions whose pyverbs was read; the tests run 44
CONSTANTS = (
    "IBV_ACCESS_LOCAL_WRITE",
    "IBV_ACCESS_REMOTE_READ",
    "IBV_ACCESS_REMOTE_WRITE",
    "IBV_QPS_ERR",
    "IBV_QPT_RC",
    "IBV_QP_EX_WITH_RDMA_READ",
    "IBV_QP_EX_WITH_RDMA_WRITE",
    "IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM",
    "IBV_QP_INIT_ATTR_PD",
    "IBV_QP_INIT_ATTR_SEND_OPS_FLAGS",
    "IBV_QP_STATE",
    "IBV_SEND_SIGNALED",
    "IBV_WR_RDMA_WRITE_WITH_IMM",
)


_FORK_UNNEEDED = 2  # of `enum ibv_fork_status`

log = logging.getLogger(__name__)


class Library(NamedTuple):
    """What of pyverbs is used.

    Attributes:
        version: of rdma-core, as far as it can be told; 0 if not.
        source: where it was found.
        enums: the constants that are used, as plain numbers.
    """

    version: int
    source: str
    enums: Any
    device: Any
    pd: Any
    mr: Any
    cq: Any
    qp: Any
    wr: Any
    addr: Any
    error: type[Exception]


class Found(NamedTuple):
    """Where pyverbs is; nothing is loaded yet. `folder` is None where Python finds it itself."""

    folder: Path | None
    text: str


def find() -> Found | None:
    """Return where pyverbs is, without loading it."""
    if importlib.util.find_spec("pyverbs") is not None:
        try:
            return Found(None, f"pyverbs {importlib.metadata.version('pyverbs')}")
        except importlib.metadata.PackageNotFoundError:
            return Found(None, "pyverbs without a version")
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    for folder in DISTRIBUTION_FOLDERS:
        package = Path(folder) / "pyverbs"
        if any((package / f"qp{suffix}").exists() for suffix in suffixes):
            return Found(package, f"pyverbs of this system, in {folder}")
    return None


def absence() -> str:
    """Return why pyverbs cannot be loaded here, as far as a look tells; or ""."""
    if find() is not None:
        return ""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    return (
        f"no pyverbs for Python {version}: apt install python3-pyverbs (with the system's Python "
        "version), or pip install pyverbs of the version that rdma-core has here"
    )


@functools.cache
def load() -> Library:
    """Load pyverbs.

    Raises:
        ImportError: there is none, or its rdma-core is another one; says what to do.
    """
    found = find()
    if found is None:
        raise ImportError(absence())
    if found.folder is not None:
        _adopt(found.folder)
    try:
        names = ("device", "pd", "mr", "cq", "qp", "wr", "addr")
        modules = {name: importlib.import_module(f"pyverbs.{name}") for name in names}
        constants = _constants()
    except ImportError as error:
        raise ImportError(
            f"{found.text} does not load ({error}): it needs rdma-core of its own version, and "
            f"here is {core_version() or 'none'}"
        ) from error
    _permit_forks()
    error_type: type[Exception] = importlib.import_module("pyverbs.pyverbs_error").PyverbsError
    return Library(core_version(), found.text, constants, **modules, error=error_type)


def _permit_forks() -> None:
    """Let this process fork while its memory is registered, before any is.

    Kernels before 5.12 leave a child the pages that a device reads and writes, and its parent copies
    of them, unless a child does not get the pages at all. Where no kernel needs that it does harm: a
    child without a page of its heap crashes.
    """
    core = ctypes.CDLL("libibverbs.so.1")
    if core.ibv_is_fork_initialized() == _FORK_UNNEEDED:
        return
    code = core.ibv_fork_init()
    if code:
        log.warning("kvferry: ibv_fork_init: %s: do not fork this process", os.strerror(code))


def core_version() -> int:
    """rdma-core's version, out of the name of its library (libibverbs.so.1.14.44.0); 0 if unknown."""
    try:
        ctypes.CDLL("libibverbs.so.1")
        with open("/proc/self/maps") as maps:
            paths = re.findall(r"\S*libibverbs\.so\S*", maps.read())
    except OSError:
        return 0
    for path in paths:
        match = re.search(r"\.so\.\d+\.\d+\.(\d+)", os.path.realpath(path))
        if match:
            return int(match[1])
    return 0


def _adopt(folder: Path) -> None:
    """Make the package of this folder, and nothing beside it, importable as `pyverbs`."""
    spec = importlib.util.spec_from_file_location(
        "pyverbs", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{folder} is no package")
    package = importlib.util.module_from_spec(spec)
    sys.modules["pyverbs"] = package
    spec.loader.exec_module(package)


def _constants() -> SimpleNamespace:
    """Return the constants, wherever this version has them: in a module called `enums` until 57, in
    `libibverbs_enums` since then; by their own names, or within the enumerations that they are of.

    Raises:
        ImportError: one is nowhere; says which.
    """
    places: list[Any] = []
    for name in ("pyverbs.enums", "pyverbs.libibverbs_enums"):
        with contextlib.suppress(ImportError):
            module = importlib.import_module(name)
            places += [
                module,
                *(value for value in vars(module).values() if isinstance(value, type)),
            ]
    found = {}
    for name in CONSTANTS:
        value = next((getattr(place, name) for place in places if hasattr(place, name)), None)
        if value is None:
            raise ImportError(f"it has no constant {name}")
        found[name] = int(value)
    return SimpleNamespace(**found)
