"""Which ways of RDMA devices to GPU memory this machine has: dma-buf, nvidia-peermem, or none.

A dma-buf that the CUDA driver exports and the RDMA driver maps needs no further kernel module; with the
module nvidia-peermem a GPU address registers like any other. `kvferry doctor` tells. The transport uses
neither: it stages GPU memory in pinned host memory (decision 0049).
"""

from __future__ import annotations

from pathlib import Path

from ...errors import DeviceError
from ...memory import cuda_driver as cuda

PEERMEM = Path("/sys/module/nvidia_peermem")
DMABUF, MODULE, NOTHING = "dma-buf", "nvidia-peermem", "neither dma-buf nor nvidia-peermem"


def offered(peermem: Path = PEERMEM) -> tuple[str, str]:
    """What the machine offers, one of the three names, and why.

    Asks the driver; starts CUDA in this process.
    """
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
