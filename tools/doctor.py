"""`kvferry doctor`: which transports work on this machine, and why the others do not."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import platform
import resource
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from kvferry.engine.transports.verbs import topology

# Each is a module of `kvferry.engine.transports` with a `probe()`.
TRANSPORTS = ("cuda_ipc", "cma", "verbs", "tcp")

SYSFS = Path("/sys")
INFINIBAND = SYSFS / "class" / "infiniband"
PEERMEM = SYSFS / "module" / "nvidia_peermem"
DMABUF, MODULE, NOTHING = "dma-buf", "nvidia-peermem", "neither dma-buf nor nvidia-peermem"
PTRACE_SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")
PTRACE_SCOPES = {
    "0": "0: processes of one user may reach each other",
    "1": "1: only a parent, or a process that was allowed by name, may reach another",
    "2": "2: only with CAP_SYS_PTRACE",
    "3": "3: nobody may reach another process",
}


class Check(NamedTuple):
    """One line of the report: `ok` is None for plain information."""

    name: str
    ok: bool | None
    detail: str


def check_transport(name: str) -> Check:
    """Ask a transport itself. Never raises: a transport that cannot be imported is a finding."""
    try:
        transport = importlib.import_module(f"kvferry.engine.transports.{name}.path")
        available = transport.probe()
    except (ImportError, OSError) as error:
        return Check(name, ok=False, detail=f"cannot be loaded: {error}")
    return Check(name, ok=bool(available.ok), detail=str(available.reason))


def check_package(name: str, fix: str) -> Check:
    """Return whether a distribution is installed, by its metadata: nothing is imported."""
    try:
        return Check(name, ok=True, detail=importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name, ok=False, detail=f"not installed; {fix}")


def check_cuda_devices() -> Check:
    """Return the CUDA devices that torch sees."""
    name = "CUDA devices"
    try:
        import torch
    except ImportError as error:
        return Check(name, ok=False, detail=f"torch cannot be imported: {error}")
    if torch.version.cuda is None:
        return Check(name, ok=False, detail=f"torch {torch.__version__} is built without CUDA")
    if not torch.cuda.is_available():
        return Check(name, ok=False, detail="none, or the driver does not answer; try nvidia-smi")
    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(index) for index in range(count)})
    reach = sum(
        torch.cuda.can_device_access_peer(a, b)
        for a in range(count)
        for b in range(count)
        if a != b
    )
    peers = f", {reach} of {count * (count - 1)} pairs with peer access" if count > 1 else ""
    return Check(name, ok=True, detail=f"{count} x {', '.join(names)}{peers}")


def check_rdma_devices(root: Path = INFINIBAND) -> Check:
    """RDMA devices and the state of their ports, from sysfs."""
    name = "RDMA devices"
    found = []
    for device in sorted(root.iterdir()) if root.is_dir() else []:
        ports = []
        for port in sorted((device / "ports").iterdir()):
            state = (port / "state").read_text(encoding="ascii").split(":")[-1].strip()
            link = (port / "link_layer").read_text(encoding="ascii").strip()
            ports.append(f"port {port.name} {state} {link}")
        found.append(f"{device.name} ({', '.join(ports)})")
    if not found:
        return Check(name, ok=False, detail=f"none in {root}")
    return Check(name, ok=True, detail="; ".join(found))


def check_pyverbs() -> Check:
    """Return which pyverbs is found, and the rdma-core that it must fit."""
    from kvferry.engine.transports.verbs import library as verbs_library

    found, core = verbs_library.find(), verbs_library.core_version()
    if found is None:
        return Check("pyverbs", ok=False, detail=verbs_library.absence())
    return Check("pyverbs", ok=True, detail=f"{found.text}; rdma-core {core or 'not installed'}")


def check_nearest_nics(root: Path = SYSFS) -> Check:
    """Return the RDMA devices that are nearest to each GPU, by PCI bridges and NUMA node."""
    name = "NICs by GPU"
    nics, gpus = topology.nics(root), topology.gpus(root)
    active = [nic for nic in nics if nic.active]
    if not gpus or not active:
        return Check(name, ok=None, detail=f"{len(gpus)} GPUs, {len(active)} active RDMA ports")
    parts = []
    for number, gpu in enumerate(gpus):
        near = topology.nearest(gpu, active)
        how = topology.distance(gpu, near[0]).name
        parts.append(f"GPU {number} ({gpu.address}): {', '.join(nic.name for nic in near)} ({how})")
    return Check(name, ok=None, detail="; ".join(parts))


def check_gpu_over_rdma() -> Check:
    """Return how GPU memory goes over RDMA, and what this machine would offer besides."""
    offered, why = gpu_rdma()
    detail = f"pinned host staging; offered here and not used: {offered} ({why})"
    return Check("GPU memory over RDMA", ok=None, detail=detail)


def gpu_rdma(peermem: Path = PEERMEM) -> tuple[str, str]:
    """Return which way of RDMA devices to GPU memory this machine offers, and why.

    A dma-buf that the CUDA driver exports and the RDMA driver maps needs no further kernel module;
    with the module nvidia-peermem a GPU address registers like any other. The transport uses neither
    (decision 0049). Asks the driver; starts CUDA in this process.
    """
    from kvferry.engine.errors import DeviceError
    from kvferry.engine.memory import cuda_driver as cuda

    why = cuda.absence()
    if why:
        return NOTHING, why
    try:
        if cuda.driver().exports_dmabuf(0):
            return DMABUF, "the CUDA driver exports dma-bufs"
    except DeviceError as error:
        why = error.message
    else:
        why = "the CUDA driver exports no dma-buf: that needs its open kernel modules"
    if peermem.exists():
        return MODULE, f"{why}; nvidia-peermem is loaded"
    return NOTHING, f"{why}; nvidia-peermem is not loaded (modprobe nvidia-peermem)"


def check_ptrace_scope(path: Path = PTRACE_SCOPE) -> Check:
    """Yama's setting, which rules whether `cma` may reach a sibling process."""
    name = "Yama ptrace_scope"
    try:
        scope = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return Check(name, ok=None, detail="no Yama in this kernel: ordinary ptrace rules")
    return Check(name, ok=scope in "01", detail=PTRACE_SCOPES.get(scope, scope))


def check_memlock() -> Check:
    """Return how much memory may be pinned, which RDMA registration needs."""
    limit_nbytes, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    detail = f"{limit_nbytes >> 10} KiB; RDMA registers no more than that (ulimit -l)"
    if limit_nbytes == resource.RLIM_INFINITY:
        detail = "unlimited"
    return Check("memlock limit", ok=None, detail=detail)


def check_paths() -> Check:
    """Return where the table of direct and staged paths comes from."""
    name = "paths"
    try:
        from kvferry.engine.errors import PlanError
        from kvferry.engine.staging import thresholds as paths
    except ImportError as error:
        return Check(name, ok=False, detail=f"cannot be loaded: {error}")
    file = paths.table_file()
    if not file.exists():
        return Check(name, ok=None, detail=f"defaults; kvferry bench paths --save makes {file}")
    try:
        table = paths.load(file)
    except PlanError as error:
        return Check(name, ok=False, detail=error.message)
    limits = ", ".join(f"{t} from {n}" for t, n in sorted(table.direct_from_nbytes.items()))
    return Check(name, ok=None, detail=f"direct, in bytes a piece: {limits} ({file})")


def examine() -> tuple[list[Check], list[Check]]:
    """Return the transports' checks and the machine's."""
    transports = [check_transport(name) for name in TRANSPORTS]
    machine = [
        Check("Python", ok=None, detail=f"{platform.python_version()} on {platform.platform()}"),
        check_package("torch", "pip install torch"),
        check_package("triton", "pip install triton (Linux only)"),
        check_cuda_devices(),
        check_pyverbs(),
        check_rdma_devices(),
        check_nearest_nics(),
        check_gpu_over_rdma(),
        check_ptrace_scope(),
        check_memlock(),
        check_paths(),
    ]
    return transports, machine


def show(transports: list[Check], machine: list[Check]) -> None:
    """Print both lists as tables."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    marks = {True: "[green]yes[/green]", False: "[red]no[/red]", None: ""}
    console = Console()
    titles = (("Transports", "available", transports), ("This machine", "there", machine))
    for title, yes, checks in titles:
        table = Table("name", yes, "detail", title=title, title_justify="left")
        for check in checks:
            table.add_row(check.name, marks[check.ok], escape(check.detail))
        console.print(table)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say which transports work on this machine, and why the others do not.

    Exits 1 if no transport works.
    """
    transports, machine = examine()
    if as_json:
        lists = {"transports": transports, "machine": machine}
        report = {name: [each._asdict() for each in found] for name, found in lists.items()}
        typer.echo(json.dumps(report, indent=2))
    else:
        show(transports, machine)
    if not any(check.ok for check in transports):
        raise typer.Exit(1)
