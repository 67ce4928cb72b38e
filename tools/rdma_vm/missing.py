"""What the RDMA test machine needs on this host, and what of it is not there."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

from kvferry.engine.transports.verbs import library as verbs_library

# Programs that build and run the machine, and the Debian packages that have them. Those of the guest
# are the host's too: it runs on the host's files.
PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "modprobe": "kmod",
    "depmod": "kmod",
    "cpio": "cpio",
    "ip": "iproute2",
    "rdma": "iproute2",
    "tc": "iproute2",
    "dpkg-deb": "dpkg",
    "apt-get": "apt",
    "ib_write_bw": "perftest",
}
FILES = {
    "/bin/busybox": "busybox-static",
    "/usr/lib/python3/dist-packages/pyverbs": "python3-pyverbs",
    "/etc/libibverbs.d/rxe.driver": "ibverbs-providers",
}
PACKAGES = sorted({*PROGRAMS.values(), *FILES.values()} - {"dpkg", "apt"})
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def which(program: str) -> str | None:
    """Return where a program is; system folders are searched whatever PATH says."""
    return shutil.which(program) or shutil.which(program, path=SYSTEM_PATH)


def packages() -> set[str]:
    """Name the Debian packages that it misses here; none where it cannot run whatever is installed."""
    if not _is_its_kind_of_host():
        return set()
    lacking = {package for program, package in PROGRAMS.items() if which(program) is None}
    return lacking | {package for path, package in FILES.items() if not Path(path).exists()}


def missing() -> str:
    """Return why the machine cannot run here, in one line that says what to install; or ""."""
    if not _is_its_kind_of_host():
        return f"it is a Linux x86-64 machine, and this is {platform.system()} {platform.machine()}"
    lacking = packages()
    if lacking & {"apt", "dpkg"}:
        return "it boots Debian's kernel, which apt-get fetches: this host has no apt-get"
    if lacking:
        return f"missing here: apt-get install {' '.join(sorted(lacking))}"
    return verbs_library.absence()


def _is_its_kind_of_host() -> bool:
    return platform.system() == "Linux" and platform.machine() == "x86_64"
