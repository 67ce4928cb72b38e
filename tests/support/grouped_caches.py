"""Caches of several groups for tests: hybrid models, latents beside an indexer, slices of a latent."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from kvferry.engine.layout.join import join_groups, join_planes
from kvferry.engine.layout.kv_layout import KVLayout

NUM_LAYERS = 2
LATENT, ROPE, SLICES = 32, 8, 4
WINDOW = 6
INDEX_NBYTES = 132  # 128 numbers of fp8 and a float32 for them, as DeepSeek's indexer keeps


class Grouped(NamedTuple):
    """One rank's cache: a tensor for each region, all in memory of their own or views of one."""

    layout: KVLayout
    tensors: list[torch.Tensor]

    def to(self, device: str) -> Grouped:
        """The same bytes elsewhere, those between the views included."""
        copies: dict[int, torch.Tensor] = {}
        moved = []
        for tensor in self.tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in copies:
                count = storage.nbytes() // tensor.element_size()
                whole = torch.as_strided(tensor, (count,), (1,), 0)
                copies[storage.data_ptr()] = whole.to(device, copy=True)
            whole = copies[storage.data_ptr()]
            moved.append(whole.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset()))
        return Grouped(self.layout, moved)

    def equals(self, other: Grouped) -> bool:
        """Every byte of every tensor's memory, those in no block included."""
        return all(map(torch.equal, map(_memory, self.tensors), map(_memory, other.tensors)))

    def spans(self) -> list[torch.Tensor]:
        """From where each region begins, the bytes behind it."""
        return [
            _memory(tensor)[tensor.storage_offset() * tensor.element_size() :]
            for tensor in self.tensors
        ]


def _memory(tensor: torch.Tensor) -> torch.Tensor:
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    return torch.as_strided(tensor, (count,), (1,), 0).cpu().view(torch.uint8)


def filled(*shape: int, seed: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """Random bytes."""
    generator = torch.Generator().manual_seed(seed)
    nbytes = int(torch.Size(shape).numel()) * dtype.itemsize
    raw = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape)


def hybrid(tokens: int, blocks: int, *, seed: int | None) -> Grouped:
    """Layer 0 attends to all, layer 1 to a window of 6 tokens, layer 2 keeps a state; zeros without
    a seed."""
    shapes = [(2, blocks, tokens, 2, 4)] * 2 + [(blocks, 10)]
    dtypes = (torch.int16, torch.int16, torch.float32)
    tensors = [
        torch.zeros(shape, dtype=dtype)
        if seed is None
        else filled(*shape, seed=seed + i, dtype=dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    dims = "plane block token head dim"
    layout = join_groups(
        KVLayout.from_tensors([tensors[0]], dims, layers=[0]),
        KVLayout.from_tensors(
            [tensors[1]], dims, layers=[1], kind="swa", window=WINDOW, null_slot=0
        ),
        KVLayout.from_tensors(
            [tensors[2]], "block dim", layers=[2], planes=["state"], kind="ssm", null_slot=0
        ),
    )
    return Grouped(layout, tensors)


def indexed(tokens: int, blocks: int, *, seed: int) -> Grouped:
    """A latent and the keys of an indexer, behind a block table each."""
    whole: dict[str, Any] = {"kind": "mla", "tp_mode": "replicate"}
    latents = [
        filled(blocks, tokens, LATENT + ROPE, seed=seed + i, dtype=torch.int16)
        for i in range(NUM_LAYERS)
    ]
    keys = [
        filled(blocks, tokens, INDEX_NBYTES, seed=seed + NUM_LAYERS + i) for i in range(NUM_LAYERS)
    ]
    layout = join_groups(
        KVLayout.from_tensors(latents, "block token dim", **whole),
        KVLayout.from_tensors(keys, "block token dim", planes=["index"], **whole),
    )
    return Grouped(layout, [*latents, *keys])


def latent(slices: tuple[int, int], tokens: int, *, seed: int | None) -> Grouped:
    """`[latent slices | rotary part]` a token; the rotary part is on every rank."""
    width = LATENT // SLICES
    mine = slices[1] - slices[0]
    pool = torch.zeros(NUM_LAYERS, 6, tokens, mine * width + ROPE, dtype=torch.int16)
    if seed is not None:
        whole = filled(NUM_LAYERS, 6, tokens, LATENT + ROPE, seed=seed, dtype=torch.int16)
        pool[..., : mine * width] = whole[..., slices[0] * width : slices[1] * width]
        pool[..., mine * width :] = whole[..., LATENT:]
    parts = [pool[..., : mine * width].unflatten(-1, (mine, width)), pool[..., mine * width :]]  # type: ignore[no-untyped-call]
    layout = join_planes(
        KVLayout.from_tensors(
            parts[0],
            "layer block token head dim",
            planes=["latent"],
            head_start=slices[0],
            kind="mla",
            tp_mode="replicate",
        ),
        KVLayout.from_tensors(
            parts[1], "layer block token dim", planes=["k_pe"], kind="mla", tp_mode="replicate"
        ),
    )
    return Grouped(layout, parts)


def latent_ranks(degree: int, tokens: int, *, seed: int | None) -> list[Grouped]:
    """A latent cut into equal slices for so many ranks."""
    share = SLICES // degree
    return [latent((r * share, (r + 1) * share), tokens, seed=seed) for r in range(degree)]


def move(pieces: Any, src: Grouped, dst: Grouped) -> None:
    """What a list of pieces does, in host memory."""
    here, there = src.spans(), dst.spans()
    for a, begin, b, end, nbytes in zip(*pieces, strict=True):
        there[b][end : end + nbytes] = here[a][begin : begin + nbytes]
