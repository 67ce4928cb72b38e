"""Two paged caches of one shape: the check before a copy between them, and the copy on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import ShapeError

if TYPE_CHECKING:
    import torch

    from .paged import PagedCache


def check_pair(src: PagedCache, dst: PagedCache, num_src_ids: int, num_dst_ids: int) -> None:
    """Raises ShapeError, by the name of the dimension, unless blocks of `src` fit into `dst`."""
    outer, inner = src.names
    if src.names != dst.names:
        raise ShapeError(f"src rows are in order {src.names}, dst rows in order {dst.names}")
    dim_src, dim_dst = src.geometry.dim_nbytes, dst.geometry.dim_nbytes
    for name, here, there in (
        ("layer", src.num_layers, dst.num_layers),
        ("plane", src.num_planes, dst.num_planes),
        ("block", num_src_ids, num_dst_ids),
        (outer, src.geometry.outer, dst.geometry.outer),
        (inner, src.geometry.inner, dst.geometry.inner),
        ("dim", dim_src // src.dtype.itemsize, dim_dst // dst.dtype.itemsize),
    ):
        if here != there:
            raise ShapeError(f"dim '{name}' is {here} in src and {there} in dst")
    if src.dtype != dst.dtype:
        raise ShapeError(f"src is {src.dtype}, dst {dst.dtype}")
    if src.device != dst.device:
        raise ShapeError(f"the tables of src are on {src.device}, those of dst on {dst.device}")


def copy_on_cpu(
    src: PagedCache, src_ids: torch.Tensor, dst: PagedCache, dst_ids: torch.Tensor
) -> None:
    """One vectorised call for each layer and plane."""
    for here, there in zip(src.integer_views(), dst.integer_views(), strict=True):
        there.index_copy_(0, dst_ids.long(), here.index_select(0, src_ids))
