"""The caches of `kvferry bench layouts`, and what must be in them after a move."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from kvferry.engine.layout.join import join_planes
from kvferry.engine.layout.kv_layout import KVLayout
from kvferry.kernels.cast import cast_reference
from kvferry.kernels.scaling import scales_reference
from kvferry.tools.bench.figures import WrongBytes

NHD, HND = "plane block token head dim", "plane block head token dim"


@dataclasses.dataclass(frozen=True)
class Shape:
    """One rank's cache.

    Attributes:
        heads: range of the model's heads.
        scales: numbers a plane of a layer has: 0, 1, or one a head.
        by_block: these lie beside the cache, as many for each block, and a transfer makes them.
    """

    order: str
    tokens: int
    heads: tuple[int, int] = (0, 8)
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    scales: int = 0
    by_block: bool = False

    @property
    def num_heads(self) -> int:
        return self.heads[1] - self.heads[0]

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token of one plane."""
        return self.num_heads * self.dim * self.dtype.itemsize

    def sizes(self, num_blocks: int) -> list[int]:
        """Of a layer's tensor with so many blocks."""
        sizes = {"plane": 2, "block": num_blocks, "token": self.tokens}
        sizes |= {"head": self.num_heads, "dim": self.dim}
        return [sizes[name] for name in self.order.split()]


class Cache:
    """One rank's cache, a tensor a layer, with `spare` times the blocks of its one request."""

    def __init__(
        self,
        shape: Shape,
        num_tokens: int,
        *,
        layers: int,
        spare: int = 1,
        device: int | None = None,
    ) -> None:
        self.shape, self.num_tokens = shape, num_tokens
        where = "cpu" if device is None else f"cuda:{device}"
        used = -(-num_tokens // shape.tokens)
        size = shape.sizes(spare * used)
        self.pools = [torch.zeros(size, dtype=shape.dtype, device=where) for _ in range(layers)]
        drawn = np.random.default_rng(1).uniform(0.01, 0.05, (layers, max(1, shape.scales)))
        self.scales = drawn.astype(np.float32)
        fixed = shape.scales and not shape.by_block
        self.layout = KVLayout.from_tensors(
            self.pools,
            shape.order,
            head_start=shape.heads[0],
            scales={"k": self.scales, "v": self.scales} if fixed else None,
        )
        self.block_scales: list[torch.Tensor] = []
        if shape.by_block:
            sizes = (2, spare * used, shape.scales, 1)
            self.block_scales = [torch.zeros(sizes, device=where) for _ in range(layers)]
            beside = KVLayout.from_tensors(
                self.block_scales,
                "plane block head dim",
                planes=["k_scale", "v_scale"],
                tokens_per_block=shape.tokens,
                head_start=shape.heads[0],
            )
            self.layout = join_planes(self.layout, beside)
        self.tensors = self.pools + self.block_scales
        random = np.random.default_rng(shape.tokens + (device or 0))
        self.table = random.permutation(spare * used)[:used].astype(np.int64)
        self.ids = torch.from_numpy(self.table).to(where)

    def logical(self, layer: int) -> torch.Tensor:
        """Return a view `[plane, block, token, head, dim]`."""
        pool = self.pools[layer]
        return pool if self.shape.order == NHD else pool.transpose(2, 3)

    def request(self, layer: int) -> torch.Tensor:
        """Return the request's numbers, `[plane, token, head, dim]`: a copy."""
        return self.logical(layer)[:, self.ids].flatten(1, 2)[:, : self.num_tokens]

    def fill(self, layer: int, numbers: torch.Tensor) -> None:
        """Put such numbers into the request's blocks."""
        tokens = torch.arange(self.num_tokens)
        blocks, places = self.ids[tokens // self.shape.tokens], tokens % self.shape.tokens
        self.logical(layer)[:, blocks, places] = numbers

    def check(self, layer: int, sent: torch.Tensor, heads: slice = slice(None)) -> None:
        """Compare the request with numbers that were sent, cast as PyTorch does, to the bit.

        Args:
            heads: of the cache's, those that were sent.

        Raises:
            WrongBytes: something else is there, or other scales.
        """
        want, got = self._cast(layer, sent), self.request(layer)[:, :, heads]
        if not torch.equal(_bytes(want), _bytes(got)):
            raise WrongBytes(f"layer {layer} of {self.shape}")

    def _cast(self, layer: int, sent: torch.Tensor) -> torch.Tensor:
        shape = self.shape
        if shape.dtype == sent.dtype:
            return sent
        if not shape.by_block:
            factors = torch.from_numpy(np.float32(1.0) / self.scales[layer]).to(sent.device)
            return cast_reference(sent, factors[:, None], shape.dtype)
        padding = (0, 0, 0, 0, 0, -self.num_tokens % shape.tokens)
        padded = torch.nn.functional.pad(sent.float(), padding)
        blocks = padded.reshape(2, -1, shape.tokens, *sent.shape[2:])
        scales = scales_reference(blocks.abs().amax((2, 4)), shape.dtype)  # [plane, block, head]
        made = self.block_scales[layer][:, self.ids, :, 0]
        if not torch.equal(made.cpu(), scales.cpu()):
            raise WrongBytes(f"layer {layer} of {self.shape}")
        factors = (1 / scales)[:, :, None, :, None]
        return cast_reference(blocks, factors, shape.dtype).flatten(1, 2)[:, : self.num_tokens]


def _bytes(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.contiguous().view(torch.uint8).cpu()
