"""How tensors become a paged cache, and what is turned down by name."""

from __future__ import annotations

import pytest
import torch

from kvferry.kernels.errors import KernelError, ShapeError
from kvferry.kernels.paged import Geometry, PagedCache


def test_one_tensor_for_each_layer() -> None:
    layers = [torch.zeros(2, 9, 4, 3, 8, dtype=torch.bfloat16) for _ in range(3)]
    cache = PagedCache.from_tensors(layers, "plane block token head dim")
    assert (cache.num_layers, cache.num_planes, cache.dtype) == (3, 2, torch.bfloat16)
    assert cache.bases.tolist() == [layer[plane].data_ptr() for layer in layers for plane in (0, 1)]
    assert cache.geometry == Geometry(
        num_blocks=9,
        outer=4,
        inner=3,
        dim_nbytes=16,
        block_stride_nbytes=192,
        outer_stride_nbytes=48,
        inner_stride_nbytes=16,
        alignment_nbytes=16,
    )
    assert cache.staging_shape(5) == (3, 2, 5, 4, 3, 8)
    assert cache.nbytes(5) == 3 * 2 * 5 * 192


def test_a_stacked_tensor_with_absent_axes() -> None:
    stacked = torch.zeros(9, 3, 7, 24)
    cache = PagedCache.from_tensors(stacked, "block layer token dim")
    assert (cache.num_layers, cache.num_planes) == (3, 1)
    assert cache.bases.tolist() == [stacked[0, layer].data_ptr() for layer in range(3)]
    assert cache.staging_shape(2) == (3, 1, 2, 7, 1, 24)


def test_layers_share_memory_with_the_whole() -> None:
    cache = PagedCache.from_tensors(torch.zeros(4, 2, 3, 8), "layer plane block dim")
    part = cache.select_layers(1, 3)
    assert part.bases.data_ptr() == cache.bases[2:].data_ptr()
    assert part.bases.tolist() == cache.bases.tolist()[2:6]
    assert part.staging_shape(1) == (2, 2, 1, 1, 1, 8)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 2), (3, 1), (0, 5)])
def test_layers_that_are_not_there(start: int, stop: int) -> None:
    cache = PagedCache.from_tensors(torch.zeros(4, 3, 8), "layer block dim")
    with pytest.raises(ShapeError, match=rf"layers \[{start}, {stop}\) of a cache with 4 layers"):
        cache.select_layers(start, stop)


def test_addresses_alone_find_their_alignment_anew() -> None:
    like = PagedCache.from_tensors([torch.zeros(3, 8)], "block dim")
    cache = PagedCache.from_addresses(
        [4096, 8200], like.geometry, num_layers=2, num_planes=1, dtype=torch.float32, device="cpu"
    )
    assert cache.bases.tolist() == [4096, 8200]
    assert cache.geometry == like.geometry._replace(alignment_nbytes=8)
    with pytest.raises(ShapeError, match="known by its addresses alone"):
        cache.tensor_views()


HALF = torch.zeros(2, 3, 8, dtype=torch.float16)


@pytest.mark.parametrize(
    ("tensors", "dims", "words"),
    [
        ([torch.zeros(3, 8)], "block wombat", "must be different names"),
        ([torch.zeros(3, 3)], "block block", "must be different names"),
        ([torch.zeros(3, 8)], "token dim", "lack 'block'"),
        ([torch.zeros(3, 8)], "block token", "lack 'dim'"),
        (torch.zeros(3, 8), "block dim", "one tensor needs dims with 'layer'"),
        ([torch.zeros(2, 3, 8)], "layer block dim", "needs dims without 'layer'"),
        ([], "block dim", "'layer' has size 0"),
        ([torch.zeros(3, 8)], "plane block dim", "layer 0 has 2 dims"),
        ([torch.zeros(3, 8), torch.zeros(4, 8)], "block dim", "'block' is 4 in layer 1 and 3"),
        (
            [torch.zeros(3, 8), torch.zeros(3, 16)[:, :8]],
            "block dim",
            "'block' has stride 16 in layer 1 and 8 in layer 0",
        ),
        ([torch.zeros(2, 3, 8), HALF], "plane block dim", r"layer 1 is torch\.float16"),
        ([torch.zeros(8, 3).T], "block dim", "'dim' has stride 3, the kernels need 1"),
    ],
)
def test_contradictions_are_named(
    tensors: torch.Tensor | list[torch.Tensor], dims: str, words: str
) -> None:
    with pytest.raises(ShapeError, match=words):
        PagedCache.from_tensors(tensors, dims)


def test_an_order_of_other_axes_is_named() -> None:
    with pytest.raises(ShapeError, match="order must hold 'token' and 'head'"):
        PagedCache.from_tensors([torch.zeros(3, 8)], "block dim", order=("token", "plane"))


def test_every_error_is_a_kernel_error_and_a_builtin_one() -> None:
    with pytest.raises(KernelError) as caught:
        PagedCache.from_tensors([], "block dim")
    assert isinstance(caught.value, ValueError)
