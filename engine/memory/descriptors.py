"""Describe registered memory to a peer: one region, or a whole cache.

What decodes here came from a peer or from the control plane, so every field has a range.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from ..errors import LayoutError
from ..layout.kv_layout import KVLayout  # noqa: TC001 - msgspec reads it at run time
from .fields import DECODE_ERRORS, IpcHandle, Key, Uint32, Uint63

KEY_NBYTES = 16


class CudaMemory(msgspec.Struct, frozen=True, array_like=True):
    """Where a region of GPU memory lies, for a process that wants to map it.

    Attributes:
        handle: CUDA IPC handle of the allocation that holds it; empty where there is none.
        offset: bytes from the start of that allocation, or of the first chunk, to the region's.
        device_uuid: the GPU, named alike in all processes.
        counters: IPC handle of the owning engine's counters on that GPU.
        counters_address: where they lie in the owning process.
        chunks: without a handle, the owning process's file descriptors of the chunks that hold it,
            and the bytes of each.
    """

    handle: IpcHandle
    offset: Uint63
    device_uuid: str
    counters: IpcHandle
    counters_address: Uint63
    chunks: Annotated[tuple[tuple[Uint32, Uint63], ...], msgspec.Meta(max_length=1 << 16)] = ()


class RegionDescriptor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a peer needs to write or read a region. It goes to the peer; the key is the permission.

    Attributes:
        engine_id: the engine (and so the generation) that registered it.
        region_id: its number there.
        key: 128 random bits; without them every access is refused.
        address: virtual address in the owning process.
        nbytes: size.
        kind: `host` for memory of the process, `cuda` for memory of a GPU.
        cuda: for GPU memory, what a peer needs to map it.
    """

    engine_id: str
    region_id: Uint32
    key: Key
    address: Uint63
    nbytes: Uint63
    kind: str = "host"
    cuda: CudaMemory | None = None

    def __repr__(self) -> str:
        return f"<RegionDescriptor {self.region_id} {self.nbytes} bytes>"  # without its key


class CacheDescriptor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A registered cache as a peer sees it: its layout and the descriptor of each region.

    Attributes:
        ranks: the layouts of all ranks that hold the model's cache together; empty where it is one.
        rank: which of them this is.
    """

    layout: KVLayout
    regions: tuple[RegionDescriptor, ...]
    ranks: tuple[KVLayout, ...] = ()
    rank: Uint32 = 0

    def encode(self) -> bytes:
        """MessagePack bytes, for the control plane."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> CacheDescriptor:
        """Read what `encode` wrote, and check that it makes sense.

        Raises:
            LayoutError: it does not decode, or contradicts itself.
        """
        try:
            cache = _cache_decoder.decode(data)
        except DECODE_ERRORS as error:
            raise _wrong(f"not a cache descriptor: {error}") from error
        cache.check()
        return cache

    def check(self) -> None:
        """Check that layout and regions fit together; also for one that came another way.

        Raises:
            LayoutError: they do not, or the layout contradicts itself.
        """
        self.layout.check()
        for layout in self.ranks:
            layout.check()
        if self.ranks and (self.rank >= len(self.ranks) or self.ranks[self.rank] != self.layout):
            raise _wrong(
                f"rank {self.rank} of {len(self.ranks)} ranks does not have the cache's own layout"
            )
        if len(self.regions) != len(self.layout.regions):
            raise _wrong(f"{len(self.regions)} regions for a layout of {len(self.layout.regions)}")
        for number, (region, shape) in enumerate(
            zip(self.regions, self.layout.regions, strict=True)
        ):
            if shape.nbytes > region.nbytes or len(region.key) != KEY_NBYTES:
                raise _wrong(
                    f"region {number} has {region.nbytes} bytes, its layout needs {shape.nbytes}"
                )


def _wrong(why: str) -> LayoutError:
    return LayoutError(why, operation="hello")


# Made here and not where it is used: msgspec works a type out when it first meets it, and two threads
# that do so at once take the process down (msgspec 0.22: segmentation fault).
_cache_decoder = msgspec.msgpack.Decoder(CacheDescriptor)
