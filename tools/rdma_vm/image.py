"""The RDMA test machine's kernel and initramfs: built once a kernel version, kept in a cache."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from kvferry.tools import pinned
from kvferry.tools.rdma_vm.missing import SYSTEM_PATH

HERE = Path(__file__).parent
META_PACKAGE = "linux-image-amd64"
MODULES = (
    "virtio_pci",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "overlay",
    "crc32_generic",
    "crc32c_generic",
    "veth",
    "sch_netem",
    "rdma_rxe",
    "rdma_ucm",
)


class ImageError(Exception):
    """The kernel or the initramfs cannot be made; says why in one line."""


class Image(NamedTuple):
    """What QEMU boots."""

    kernel: Path
    initramfs: Path


def cache_folder() -> Path:
    """Return where images are kept: `$XDG_CACHE_HOME/kvferry/rdma-vm`."""
    return pinned.cache_folder() / "rdma-vm"


def build() -> Image:
    """Return the image of Debian's current kernel; made if it is not in the cache. Several may ask
    at once.

    Raises:
        ImageError: a step failed.
    """
    package = kernel_package()
    recipe = hashlib.sha256((HERE / "init.sh").read_bytes() + repr(MODULES).encode()).hexdigest()
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    ready = folder / f"{package}-{recipe[:12]}"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                _build(package, Path(scratch))
                (Path(scratch) / "image").rename(ready)
    return Image(ready / "vmlinuz", ready / "initramfs")


def kernel_package() -> str:
    """Return the package that Debian's current kernel is in; the newest one in the cache if apt is
    silent.

    Raises:
        ImageError: neither knows one.
    """
    listing = _run(["apt-cache", "depends", META_PACKAGE], check=False)
    found = re.search(r"Depends: (linux-image-\S+)", listing)
    if found:
        return found[1]
    names = sorted(
        (path.stat().st_mtime, path.name) for path in cache_folder().glob("linux-image-*")
    )
    if names:
        return names[-1][1].rpartition("-")[0]
    raise ImageError(f"apt-cache knows no {META_PACKAGE}: run apt-get update")


def _build(package: str, scratch: Path) -> None:
    """Make `scratch/image` with a kernel and an initramfs."""
    _run(["apt-get", "download", package], cwd=scratch)
    (archive,) = scratch.glob("*.deb")
    tree, root, image = scratch / "tree", scratch / "root", scratch / "image"
    _run(["dpkg-deb", "-x", str(archive), str(tree)])
    (kernel,) = (tree / "boot").glob("vmlinuz-*")
    version = kernel.name.removeprefix("vmlinuz-")
    _run(["depmod", "-b", str(tree), version])
    for name in ("bin", "mods", "proc", "sys", "dev", "lower", "rw", "root"):
        (root / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin")
    shutil.copy(HERE / "init.sh", root / "init")
    (root / "init").chmod(0o755)
    (root / "mods" / "order").write_text("".join(_modules(tree, version, root / "mods")))
    image.mkdir()
    shutil.copy(kernel, image / "vmlinuz")
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    archived = subprocess.run(
        ["cpio", "-o", "-H", "newc", "--quiet"],
        cwd=root,
        input=names.encode(),
        stdout=subprocess.PIPE,
        env=_environment(),
        check=False,
    )
    if archived.returncode:
        raise ImageError(f"cpio failed with status {archived.returncode}")
    (image / "initramfs").write_bytes(gzip.compress(archived.stdout, 1))


def _modules(tree: Path, version: str, into: Path) -> list[str]:
    """Copy the modules and what they depend on; return their file names in loading order."""
    order: dict[str, None] = {}
    for module in MODULES:
        lines = _run(["modprobe", "-d", str(tree), "-S", version, "--show-depends", module])
        for line in lines.splitlines():
            verb, _, rest = line.partition(" ")
            if verb != "insmod":
                continue  # built into the kernel
            path = Path(rest.split()[0])
            if path.name not in order:
                shutil.copy(path, into)
                order[path.name] = None
    return [f"{name}\n" for name in order]


def _environment() -> dict[str, str]:
    return os.environ | {"PATH": f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}", "LC_ALL": "C"}


def _run(command: list[str], *, cwd: Path | None = None, check: bool = True) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if check and done.returncode:
        lines = done.stdout.strip().splitlines() or [f"status {done.returncode}"]
        raise ImageError(f"`{' '.join(command)}` failed: {lines[-1]}")
    return done.stdout
