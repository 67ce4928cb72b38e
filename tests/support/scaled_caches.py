"""Caches whose numbers have a scale a block, and what a transfer between two of them must come to."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from kvferry.engine.layout.join import join_planes
from kvferry.engine.layout.kv_layout import KVLayout
from kvferry.kernels.cast import LIMITS, cast_reference

from .caches import PagedPool

NUM_BLOCKS, LAYERS = 14, (0, 1)


class Scaled:
    """A cache with a plane of scales beside each of its planes, if its type needs them."""

    def __init__(
        self,
        order: tuple[str, ...],
        tokens: int,
        dtype: torch.dtype,
        *,
        by_head: bool = True,
        heads: tuple[int, int] = (0, 3),
        seed: int | None = None,
    ) -> None:
        self.pool = PagedPool.make(
            order,
            layers=LAYERS,
            heads=heads,
            num_blocks=NUM_BLOCKS,
            tokens=tokens,
            dim=8,
            stacked=False,
            dtype=dtype,
            seed=seed,
        )
        self.layout, self.scales = self.pool.layout, []
        if dtype in LIMITS:
            count = heads[1] - heads[0] if by_head else 1
            shape = (2, NUM_BLOCKS, count, 1)
            draw = np.random.default_rng(7)
            self.scales = [
                torch.from_numpy(draw.uniform(0.01, 0.3, shape).astype(np.float32)) for _ in LAYERS
            ]
            self.layout = join_planes(
                self.pool.layout,
                KVLayout.from_tensors(
                    [s if by_head else s[:, :, 0] for s in self.scales],
                    "plane block head dim" if by_head else "plane block dim",
                    planes=["k_scale", "v_scale"],
                    tokens_per_block=tokens,
                    head_start=heads[0],
                ),
            )

    def arrays(self) -> list[np.ndarray[Any, Any]]:
        raw = [scale.view(torch.uint8).reshape(-1).numpy() for scale in self.scales]
        return self.pool.arrays() + raw


def expect(src: Scaled, dst: Scaled, tables: Any, start: int, stop: int) -> Any:
    """Both caches' tokens, block by block of the destination: numbers and scales afterwards."""
    after = dst.pool.clone()
    scales = [scale.clone() for scale in dst.scales]
    size = after.logical(0).shape[2]
    for layer, plane, block in itertools.product(
        LAYERS, range(2), range(start // size, -(-stop // size))
    ):
        here, there = src.pool.logical(layer)[plane], after.logical(layer)[plane]
        tokens = range(max(start, block * size), min(stop, (block + 1) * size))
        from_block = here.shape[1]
        rows = []
        for token in tokens:
            home = tables[0][token // from_block]
            number = here[home, token % from_block].to(torch.float32)
            if src.scales:
                number = number * src.scales[layer][plane, home]
            rows.append(number)
        real = torch.stack(rows)  # [token, head, dim]
        target = tables[1][block]
        if dst.scales:
            limit = np.float32(1 / LIMITS[after.tensors[0].dtype])
            largest = (
                real.nan_to_num(nan=0.0)
                .abs()
                .amax(dim=(0, 2) if dst.scales[layer].shape[2] > 1 else (0, 1, 2))
            )
            chosen = torch.where(largest > 0, largest * limit, 1.0).reshape(-1)
            scales[layer][plane, target, :, 0] = chosen
        for token in tokens:
            home = tables[0][token // from_block]
            factor = src.scales[layer][plane, home] if src.scales else torch.ones(1, 1)
            if dst.scales:
                factor = factor / scales[layer][plane, target]
            number = here[home, token % from_block]
            there[target, token % size] = cast_reference(number, factor, there.dtype)
    raw = [scale.view(torch.uint8).reshape(-1).numpy() for scale in scales]
    return after.arrays() + raw


def fill_exactly(src: Scaled, dst: Scaled) -> None:
    """Numbers, and scales where the source has them, that the interpreter converts exactly."""
    draw = np.random.default_rng(11)
    exact = {torch.float8_e4m3fn, torch.float8_e5m2} & {dst.pool.tensors[0].dtype}
    for tensor in src.pool.tensors:
        if exact:
            limit = LIMITS[next(iter(exact))]
            numbers = limit * np.exp2(-draw.integers(0, 6, tensor.shape).astype(np.float32))
            numbers *= draw.choice([-1, 1], tensor.shape)
            if tensor.dtype in LIMITS:  # as powers of two, which int8 has
                numbers = np.exp2(draw.integers(0, 6, tensor.shape)) * np.sign(numbers)
        else:
            numbers = draw.normal(0, 3, tensor.shape)
        tensor.copy_(torch.from_numpy(np.asarray(numbers, np.float32)).to(tensor.dtype))
        if not exact and tensor.dtype in (torch.bfloat16, torch.float16, torch.float32):
            tensor.view(-1)[5] = torch.nan  # counts for nothing
    for scale in src.scales if exact else ():
        powers = torch.from_numpy(draw.integers(-3, 3, tuple(scale.shape)))
        scale.copy_(torch.exp2(powers.to(torch.float32)))
