"""Boots the RDMA test machine around one command, and always ends.

QEMU emulates the processor: `/dev/kvm`, where there is one inside a virtual machine, may spin at
boot, and Soft-RoCE needs no speed. The command sees this host's files as they are, may write where
it likes (an overlay in memory), and leaves nothing behind.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from kvferry.tools.rdma_vm import image
from kvferry.tools.rdma_vm.missing import which

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).parent
MEMORY_MIB = 4096
MAX_MTU = 9000  # of the veth pairs: 4,096 bytes of payload a packet, the most that RDMA has
KEPT = ("PATH", "PYTHONPATH", "VIRTUAL_ENV", "LANG", "PYTEST_DISABLE_PLUGIN_AUTOLOAD")
_PR_SET_PDEATHSIG = 1


class MachineError(Exception):
    """The machine did not get as far as the command's exit status."""


def run(
    command: Sequence[str], *, pairs: int = 1, mtu: int = MAX_MTU, timeout_s: float = 600.0
) -> int:
    """Run `command` inside, its output on this process's; return its exit status.

    Args:
        pairs: veth pairs, each with two rxe devices that reach each other: rxe0 and rxe1, …
        mtu: of the veth pairs, bytes.
        timeout_s: the machine is ended then.

    Raises:
        MachineError: the deadline came first, or the machine broke; with the kernel's last words.
        image.ImageError: there is no kernel to boot.
    """
    booted = image.build()
    with tempfile.TemporaryDirectory(prefix="kvferry-rdma-vm-") as scratch:
        folder = Path(scratch)
        shutil.copy(HERE / "guest.sh", folder)
        (folder / "settings").write_text(f"PAIRS={pairs} MTU={mtu}\n")
        (folder / "command").write_text(_script(command))
        return _boot(booted, folder, timeout_s)


def _script(command: Sequence[str]) -> str:
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    # 9p answers slowly: nothing is compiled twice, and no byte code is written to a lost overlay.
    slow = {"PYTHONDONTWRITEBYTECODE": "1", "KVFERRY_HANDSHAKE_TIMEOUT_S": "60"}
    lines = [f"export {name}={shlex.quote(value)}" for name, value in (kept | slow).items()]
    lines += [f"cd {shlex.quote(os.getcwd())}", f"exec {shlex.join(command)}"]
    return "\n".join(lines) + "\n"


def _boot(booted: image.Image, folder: Path, timeout_s: float) -> int:
    qemu = which("qemu-system-x86_64") or "qemu-system-x86_64"
    shared = "security_model=none,multidevs=remap"
    arguments = [
        *(qemu, "-machine", "q35", "-accel", "tcg,thread=multi,tb-size=1024", "-cpu", "max"),
        *("-smp", "2", "-m", str(MEMORY_MIB), "-no-reboot", "-nic", "none", "-display", "none"),
        *("-kernel", str(booted.kernel), "-initrd", str(booted.initramfs)),
        *("-append", "console=ttyS0 panic=-1 rdinit=/init mitigations=off quiet"),
        *("-serial", f"file:{folder / 'kernel.log'}", "-monitor", "none"),
        *("-device", "virtio-serial", "-device", "virtconsole,chardev=words"),
        *("-chardev", "stdio,id=words,signal=off"),
        *("-virtfs", f"local,path=/,mount_tag=host,readonly=on,{shared}"),
        *("-virtfs", f"local,path={folder},mount_tag=out,{shared}"),
    ]
    sys.stdout.flush()
    process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired as error:
        raise MachineError(
            f"not done after {timeout_s:g} s, so the machine was ended{_last_words(folder)}"
        ) from error
    finally:
        process.kill()
        process.wait()
    try:
        return int((folder / "status").read_text())
    except (OSError, ValueError) as error:
        raise MachineError(
            f"the machine ended before the command (QEMU's status {process.returncode})"
            f"{_last_words(folder)}"
        ) from error


def _die_with_parent() -> None:
    """No machine outlives a caller that is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _last_words(folder: Path) -> str:
    try:
        log = (folder / "kernel.log").read_text(errors="replace").strip()
    except OSError:
        return ""
    return "; the kernel's last words:\n" + "\n".join(log.splitlines()[-8:]) if log else ""
