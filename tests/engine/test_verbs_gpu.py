"""What a machine offers RDMA devices for GPU memory: asked of drivers that answer this and that."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from kvferry.engine.errors import DeviceError
from kvferry.engine.memory import cuda_driver as cuda
from kvferry.tools.doctor import DMABUF, MODULE, NOTHING, gpu_rdma

if TYPE_CHECKING:
    from pathlib import Path


def answer(monkeypatch: pytest.MonkeyPatch, answer: bool | str) -> None:
    """A CUDA driver that exports dma-bufs, exports none, or fails with these words."""

    def exports_dmabuf(device: int) -> bool:
        if isinstance(answer, str):
            raise DeviceError(answer, operation="cuda")
        return answer

    monkeypatch.setattr(cuda, "absence", lambda: "")
    driver = SimpleNamespace(exports_dmabuf=exports_dmabuf)
    monkeypatch.setattr(cuda, "driver", lambda: driver)


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize(
    ("driver", "offered", "why"),
    [
        (True, (DMABUF, DMABUF), "exports dma-bufs"),
        (False, (MODULE, NOTHING), "open kernel modules"),
        ("too old", (MODULE, NOTHING), "too old"),
    ],
)
def test_a_dmabuf_comes_before_the_module(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    driver: bool | str,
    offered: tuple[str, str],
    why: str,
    loaded: bool,
) -> None:
    answer(monkeypatch, driver)
    found, reason = gpu_rdma(tmp_path if loaded else tmp_path / "none")
    assert found == offered[not loaded]
    assert why in reason
    assert ("is loaded" in reason) == (found == MODULE)
    assert ("modprobe" in reason) == (found == NOTHING)


def test_without_cuda_there_is_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda, "absence", lambda: "no NVIDIA driver")
    assert gpu_rdma(tmp_path) == (NOTHING, "no NVIDIA driver")
