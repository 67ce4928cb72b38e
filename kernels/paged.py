"""A paged cache as the kernels see it: a table of base addresses, one set of strides, block ids."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from .errors import BlockIdError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDEST_NBYTES = 16  # the widest access of one thread
_DIMS = ("layer", "plane", "block", "token", "head", "dim")


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, its elements as integers of their size."""
    return tensor.view(_INTEGERS[tensor.element_size()])


class Geometry(NamedTuple):
    """The shape of a cache, in bytes; hashable, so that launch plans are cached by it.

    One block of one layer and plane is `outer` x `inner` runs of `dim_nbytes` contiguous bytes.
    """

    num_blocks: int
    outer: int
    inner: int
    dim_nbytes: int
    block_stride_nbytes: int
    outer_stride_nbytes: int
    inner_stride_nbytes: int
    alignment_nbytes: int  # of every base address, at most WIDEST_NBYTES

    @property
    def block_plane_nbytes(self) -> int:
        """Bytes of one block of one layer and plane."""
        return self.outer * self.inner * self.dim_nbytes


class PagedCache:
    """Where the blocks of a cache lie. Owns no memory of its own, but keeps given tensors alive.

    Immutable. Safe to use from several threads.

    Attributes:
        bases: int64 `[num_layers * num_planes]` on `device`: where block 0 of each layer and plane
            begins. Layers may be separate allocations.
        geometry: shape and strides, the same for every layer and plane.
        names: the names of the outer and the inner axis, `("token", "head")` or the other way round.
        views: a tensor `[block, outer, inner, dim]` for each entry of `bases`; None for memory that
            is known by its addresses alone.
    """

    def __init__(
        self,
        bases: torch.Tensor,
        geometry: Geometry,
        *,
        num_layers: int,
        num_planes: int,
        dtype: torch.dtype,
        names: tuple[str, str] = ("token", "head"),
        views: tuple[torch.Tensor, ...] | None = None,
    ) -> None:
        if bases.dtype != torch.int64 or tuple(bases.shape) != (num_layers * num_planes,):
            raise ShapeError(
                f"bases must be int64 [{num_layers} layers * {num_planes} planes], "
                f"not {bases.dtype} {list(bases.shape)}"
            )
        if geometry.dim_nbytes % dtype.itemsize:
            raise ShapeError(
                f"dim 'dim' has {geometry.dim_nbytes} bytes, no multiple of the {dtype.itemsize} "
                f"bytes of {dtype}"
            )
        self.bases = bases
        self.geometry = geometry
        self.num_layers = num_layers
        self.num_planes = num_planes
        self.dtype = dtype
        self.names = names
        self.views = views
        self.device = bases.device
        # What every launch asks for, worked out once: a launch takes the host some 10 us.
        self.num_entries = num_layers * num_planes
        self._id_nbytes = self.num_entries * geometry.block_plane_nbytes
        self._elements = geometry.dim_nbytes // dtype.itemsize

    @classmethod
    def from_tensors(
        cls,
        tensors: torch.Tensor | Sequence[torch.Tensor],
        dims: str,
        *,
        order: tuple[str, str] = ("token", "head"),
    ) -> PagedCache:
        """Describes tensors of any strides whose last named axis, `dim`, is contiguous.

        Args:
            tensors: one stacked tensor, whose dims then contain `layer`, or one for each layer.
            dims: the names of their axes, of `layer plane block token head dim`; `block` and `dim`
                must be there, the others are 1 if they are not.
            order: how the runs of a block follow each other in staging. `("head", "token")` suits two caches that
                both keep a head's tokens together (HND): a block is one contiguous piece then.

        Raises:
            ShapeError: names the axis or the layer that does not fit.
        """
        names = tuple(dims.split())
        if set(names) - set(_DIMS) or len(set(names)) != len(names):
            raise ShapeError(f"dims {dims!r} must be different names of {' '.join(_DIMS)}")
        for needed in ("block", "dim"):
            if needed not in names:
                raise ShapeError(f"dims {dims!r} lack {needed!r}")
        if sorted(order) != ["head", "token"]:
            raise ShapeError(f"order must hold 'token' and 'head', not {order!r}")
        if isinstance(tensors, torch.Tensor):
            if "layer" not in names:
                raise ShapeError(f"one tensor needs dims with 'layer'; got {dims!r}")
            where = names.index("layer")
            layers = tensors.unbind(where)
            names = names[:where] + names[where + 1 :]
        else:
            if "layer" in names:
                raise ShapeError(f"one tensor for each layer needs dims without 'layer': {dims!r}")
            layers = tuple(tensors)
        if not layers:
            raise ShapeError("dim 'layer' has size 0")
        views = [
            plane
            for number, layer in enumerate(layers)
            for plane in _planes(layer, names, order, layers[0], number)
        ]
        return cls(
            torch.tensor([view.data_ptr() for view in views], dtype=torch.int64).to(
                layers[0].device
            ),
            _geometry_of(views),
            num_layers=len(layers),
            num_planes=len(views) // len(layers),
            dtype=layers[0].dtype,
            names=order,
            views=tuple(views),
        )

    @classmethod
    def from_addresses(
        cls,
        addresses: Sequence[int],
        geometry: Geometry,
        *,
        num_layers: int,
        num_planes: int,
        dtype: torch.dtype,
        device: torch.device | str,
        names: tuple[str, str] = ("token", "head"),
    ) -> PagedCache:
        """Describes memory that is known by its addresses alone: a peer's, opened on `device`.

        Args:
            addresses: of block 0 of each layer and plane, plane fastest, as `device` sees them. The
                caller keeps them mapped for as long as launches may run.
            geometry: of the peer's cache; its alignment is found anew from the addresses.
            num_layers: of the peer's cache.
            num_planes: of the peer's cache.
            dtype: of the peer's cache.
            device: the GPU that launches, not the one that owns the memory.
            names: as in `from_tensors`.
        """
        alignment = math.gcd(WIDEST_NBYTES, *addresses)
        return cls(
            torch.tensor(addresses, dtype=torch.int64).to(device),
            geometry._replace(alignment_nbytes=alignment),
            num_layers=num_layers,
            num_planes=num_planes,
            dtype=dtype,
            names=names,
        )

    def select_layers(self, start: int, stop: int) -> PagedCache:
        """The same cache with layers `start <= layer < stop` alone; no memory is allocated."""
        if not 0 <= start < stop <= self.num_layers:
            raise ShapeError(f"layers [{start}, {stop}) of a cache with {self.num_layers} layers")
        entries = slice(start * self.num_planes, stop * self.num_planes)
        return PagedCache(
            self.bases[entries],
            self.geometry,
            num_layers=stop - start,
            num_planes=self.num_planes,
            dtype=self.dtype,
            names=self.names,
            views=None if self.views is None else self.views[entries],
        )

    def nbytes(self, num_ids: int) -> int:
        """Bytes of `num_ids` blocks of all layers and planes."""
        return num_ids * self._id_nbytes

    def staging_shape(self, num_ids: int) -> tuple[int, int, int, int, int, int]:
        """`[layer, plane, block, outer, inner, dim]`: what staging for `num_ids` blocks holds."""
        shape = self.geometry
        layers, planes, dim = self.num_layers, self.num_planes, self._elements
        return (layers, planes, num_ids, shape.outer, shape.inner, dim)

    def check_ids(self, ids: torch.Tensor, name: str = "ids") -> torch.Tensor:
        """Returns the ids on the device of this cache.

        Ids in host memory are checked against the cache. Those of a GPU stay unread: the kernels
        skip and flag what is out of range. Ids in host memory for a cache on a GPU are copied there,
        which a CUDA graph cannot hold.

        Raises:
            ShapeError: not a contiguous one-dimensional int32 or int64 tensor of a known device.
            BlockIdError: an id out of range, with its position.
        """
        if ids.dim() != 1 or ids.dtype not in (torch.int32, torch.int64) or not ids.is_contiguous():
            raise ShapeError(
                f"{name} must be contiguous int32 or int64 [block], not {ids.dtype} "
                f"{list(ids.shape)} with strides {list(ids.stride())}"
            )
        if ids.device == self.device and ids.device.type != "cpu":
            return ids
        if ids.device.type != "cpu":
            raise ShapeError(f"{name} are on {ids.device}, the cache on {self.device}")
        if ids.numel():
            low, high = (int(bound) for bound in ids.aminmax())
            if low < 0 or high >= self.geometry.num_blocks:
                bad = (ids < 0) | (ids >= self.geometry.num_blocks)
                position = int(bad.nonzero()[0, 0])
                raise BlockIdError(
                    f"{name}[{position}] is {int(ids[position])}, outside the "
                    f"{self.geometry.num_blocks} blocks of the cache",
                    position=position,
                    block_id=int(ids[position]),
                )
        return ids.to(self.device)

    def check_staging(self, staging: torch.Tensor, num_ids: int) -> None:
        """Raises ShapeError, by the name of the dimension, unless `staging` fits `num_ids` blocks.

        Staging lies on the device of the cache, or in pinned host memory for a cache on a GPU.
        """
        wanted = self.staging_shape(num_ids)
        if staging.shape != wanted:
            names = ("layer", "plane", "block", *self.names, "dim")
            if staging.dim() != len(wanted):
                raise ShapeError(f"staging must have dims {names}, not {staging.dim()} dims")
            for name, want, have in zip(names, wanted, staging.shape, strict=True):
                if want != have:
                    raise ShapeError(f"staging dim '{name}' is {have}, the cache needs {want}")
        if staging.dtype != self.dtype:
            raise ShapeError(f"staging is {staging.dtype}, the cache {self.dtype}")
        if not staging.is_contiguous():
            raise ShapeError(f"staging must be contiguous, its strides are {staging.stride()}")
        if staging.device != self.device and not staging.is_pinned():
            raise ShapeError(f"staging is on {staging.device} unpinned, the cache on {self.device}")

    def check_flag(self, flag: torch.Tensor | None) -> None:
        """Raises ShapeError unless `flag` is None or int32 `[1]` on the device of the cache."""
        if flag is not None and (
            flag.dtype != torch.int32 or flag.numel() != 1 or flag.device != self.device
        ):
            raise ShapeError(f"bad_ids must be int32 [1] on {self.device}, not {flag.dtype}")

    def tensor_views(self) -> tuple[torch.Tensor, ...]:
        """The views, which the references work on."""
        if self.views is None:
            raise ShapeError("a cache known by its addresses alone has no tensors to index")
        return self.views

    def integer_views(self) -> tuple[torch.Tensor, ...]:
        """The views as integers, for the path on a CPU: PyTorch cannot index every dtype there."""
        return tuple(as_integers(view) for view in self.tensor_views())


def _planes(
    layer: torch.Tensor,
    names: tuple[str, ...],
    order: tuple[str, str],
    first: torch.Tensor,
    number: int,
) -> tuple[torch.Tensor, ...]:
    """The planes of one layer, each `[block, outer, inner, dim]` with its own strides."""
    if layer.dim() != len(names):
        raise ShapeError(f"layer {number} has {layer.dim()} dims, dims name {len(names)}: {names}")
    for name, size, want in zip(names, layer.shape, first.shape, strict=True):
        if size != want:
            raise ShapeError(f"dim '{name}' is {size} in layer {number} and {want} in layer 0")
    for name, stride, want in zip(names, layer.stride(), first.stride(), strict=True):
        if stride != want:
            raise ShapeError(
                f"dim '{name}' has stride {stride} in layer {number} and {want} in layer 0"
            )
    if layer.dtype != first.dtype or layer.device != first.device:
        raise ShapeError(
            f"layer {number} is {layer.dtype} on {layer.device}, "
            f"layer 0 {first.dtype} on {first.device}"
        )
    where = names.index("dim")
    if layer.stride(where) != 1 and layer.shape[where] > 1:
        raise ShapeError(f"dim 'dim' has stride {layer.stride(where)}, the kernels need 1")
    # Absent axes are added in front, then all are put in order.
    absent = [name for name in ("plane", *order) if name not in names]
    for _ in absent:
        layer = layer.unsqueeze(0)
    have = (*reversed(absent), *names)
    return layer.permute([have.index(name) for name in ("plane", "block", *order, "dim")]).unbind(0)


def _geometry_of(views: Sequence[torch.Tensor]) -> Geometry:
    num_blocks, outer, inner, dim = views[0].shape
    block_stride, outer_stride, inner_stride, _ = (
        stride * views[0].element_size() for stride in views[0].stride()
    )
    return Geometry(
        num_blocks=num_blocks,
        outer=outer,
        inner=inner,
        dim_nbytes=dim * views[0].element_size(),
        block_stride_nbytes=block_stride,
        outer_stride_nbytes=outer_stride,
        inner_stride_nbytes=inner_stride,
        alignment_nbytes=math.gcd(WIDEST_NBYTES, *(view.data_ptr() for view in views)),
    )
