"""vLLM's paged caches as a `KVLayout`.

vLLM gives one tensor a layer, `[block, head, token, content]`, whatever its strides; K and V lie side
by side in the content. That holds for GPU backends. The CPU backends *advertise* it but store K
transposed inside a block, in an order that depends on the machine's instruction set: so for them
token and content are opaque, the codec names backend and instruction set, and a peer that differs in
either, or in block size, is refused when agents meet.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from ..engine.errors import LayoutError
from ..engine.layout import PLAIN_CODEC, KVLayout

if TYPE_CHECKING:
    from collections.abc import Mapping

DIMS = "block head token dim"
OPAQUE_ON_CPU = ("token", "dim")


class Backend(NamedTuple):
    """What fills the cache.

    Attributes:
        name: of vLLM's attention backend, such as `CPU_ATTN`.
        isa: of the CPU backend, such as `vec` or `amx`; "" elsewhere.
        version: vLLM's; what is opaque may change with it.
    """

    name: str
    isa: str
    version: str


class Heads(NamedTuple):
    """Which of the model's KV heads this rank holds.

    Attributes:
        start: the first.
        model: how many the model has.
        replicated: whether other ranks hold the same ones.
    """

    start: int
    model: int
    replicated: bool


def layer_number(name: str) -> int:
    """The model's number of a layer: `model.layers.7.self_attn.attn` is 7.

    Raises:
        LayoutError: the name has no number, or several.
    """
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    if len(numbers) != 1:
        raise LayoutError(
            f"layer {name!r} has {len(numbers)} numbers in its name: exactly one is expected",
            operation="layout",
        )
    return int(numbers[0])


def heads_of_rank(model_heads: int, tp_size: int, tp_rank: int) -> Heads:
    """vLLM splits heads evenly over ranks; ranks beyond the number of heads share them."""
    return Heads(tp_rank * model_heads // tp_size, model_heads, tp_size > model_heads)


def describe_caches(
    caches: Mapping[str, Any], backend: Backend, heads: Heads
) -> tuple[KVLayout, dict[str, int]]:
    """Describes the caches that vLLM registers.

    Args:
        caches: a tensor `[block, head, token, content]` for each layer, by the layer's name.

    Returns:
        The layout, and for each layer's name its position among the layout's layers.

    Raises:
        LayoutError: caches that cannot be described: state-space layers, two caches a layer.
    """
    numbers = {name: layer_number(name) for name in caches}
    order = sorted(caches, key=numbers.__getitem__)
    for name in order:
        if len(caches[name].shape) != 4:
            raise LayoutError(
                f"the cache of layer {name!r} has shape {tuple(caches[name].shape)}: only paged "
                "attention caches of 4 dimensions are moved, no state-space ones",
                operation="layout",
            )
    on_cpu = caches[order[0]].device.type == "cpu"
    layout = KVLayout.from_tensors(
        [caches[name] for name in order],
        DIMS,
        layers=[numbers[name] for name in order],
        planes=("kv",),
        head_start=heads.start,
        tp_mode="replicate" if heads.replicated else "split",
        codec=f"vllm/{backend.name}/{backend.isa}/{backend.version}" if on_cpu else PLAIN_CODEC,
        opaque=OPAQUE_ON_CPU if on_cpu else (),
    )
    return layout, {name: position for position, name in enumerate(order)}
