"""How an RDMA device reaches GPU memory on this machine: dma-buf, nvidia-peermem, or not at all.

In order: a dma-buf that the CUDA driver exports and the RDMA driver maps, which needs no further
kernel module; the module nvidia-peermem, with which a GPU address registers like any other; else
the caches of GPUs go through pinned host staging.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import cuda
from ..errors import DeviceError, NotRegistered

if TYPE_CHECKING:
    from ..memory import MemoryRegion
    from .verbs_device import Device

PEERMEM = Path("/sys/module/nvidia_peermem")
DMABUF, MODULE, STAGING = "dma-buf", "nvidia-peermem", "pinned host staging"


def choose(peermem: Path = PEERMEM) -> tuple[str, str]:
    """How GPU memory goes over RDMA here, and why: one of the three names, and a reason.

    Asks the driver; starts CUDA in this process.
    """
    why = cuda.absence()
    if why:
        return STAGING, why
    try:
        if cuda.driver().exports_dmabuf(0):
            return DMABUF, "the CUDA driver exports dma-bufs"
    except DeviceError as error:
        why = error.message
    else:
        why = "the CUDA driver exports no dma-buf: that needs its open kernel modules"
    if peermem.exists():
        return MODULE, f"{why}; nvidia-peermem is loaded"
    return STAGING, f"{why}; nvidia-peermem is not loaded (modprobe nvidia-peermem)"


def register(device: Device, region: MemoryRegion) -> Any:
    """Registers a region of GPU memory with an RDMA device.

    Raises:
        NotRegistered: this machine has no way to.
    """
    how, why = choose()
    library = device.library
    try:
        if how == DMABUF:
            fd, offset = cuda.driver().dmabuf(region.device, region.address, region.nbytes)
            try:
                return library.mr.DmaBufMR(
                    device.pd, region.nbytes, device.access, dmabuf=fd, offset=offset
                )
            finally:
                os.close(fd)  # the registration holds the buffer from here on
        if how == MODULE:
            return library.mr.MR(device.pd, region.nbytes, device.access, address=region.address)
    except (library.error, DeviceError) as error:
        why = f"{how} refuses it: {error}"
    raise NotRegistered(
        f"RDMA device {device.name} does not reach GPU memory: {why}", operation="register"
    )
