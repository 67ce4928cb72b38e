"""What a reconciliation of two layouts comes to: copy groups of planes, and pairs of block tables.

A plane of a layer that both sides hold is an *entry*. Entries whose regions have the same shape and
strides on each side form a *copy group*: all that differs between them is where each begins. Bundles of
one pair of block tables form a *table pair*.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Collection

    import numpy.typing as npt

    from ..layout.block_scales import BlockScales


class Step(NamedTuple):
    """One axis that is walked on both sides."""

    name: str
    size: int
    src_stride: int
    dst_stride: int


@dataclasses.dataclass(frozen=True, eq=False)
class CopyGroup:
    """Entries of one shape.

    Attributes:
        layer, src_region, src_start, dst_region, dst_start: columns, one row an entry: byte 0 of
            slot 0, with the heads that both hold.
        src_slot_stride, dst_slot_stride: bytes that a block id adds.
        token: the token axis; None where a slot is moved whole.
        steps: the other axes of more than one step, none of them `dim`.
        elements: of one innermost run.
        src_elem, dst_elem: bytes of an element.
        src_dtype, dst_dtype: names.
        factors: `[entry, 1 or heads]` that numbers are multiplied by on their way; None for bits.
        src_scales: also multiplied by these, of the source's blocks.
        dst_scales: divided by these, which are found and written for each destination's block.
    """

    layer: npt.NDArray[np.int64]
    src_region: npt.NDArray[np.int64]
    src_start: npt.NDArray[np.int64]
    dst_region: npt.NDArray[np.int64]
    dst_start: npt.NDArray[np.int64]
    src_slot_stride: int
    dst_slot_stride: int
    token: Step | None
    steps: tuple[Step, ...]
    elements: int
    src_elem: int
    dst_elem: int
    src_dtype: str
    dst_dtype: str
    factors: npt.NDArray[np.float32] | None = None
    src_scales: BlockScales | None = None
    dst_scales: BlockScales | None = None

    @property
    def by_head(self) -> bool:
        """Whether a run must not hold numbers of several heads: their scales may differ."""
        shapes = [scales.shape for scales in (self.src_scales, self.dst_scales) if scales]
        wide = self.factors is not None and self.factors.shape[1] > 1
        return wide or any(shape.head_stride for shape in shapes)

    @property
    def scales_per_block(self) -> int:
        """How many scales an entry writes beside each block of the destination."""
        if self.dst_scales is None:
            return 0
        heads = [step.size for step in self.steps if step.name == "head"]
        return heads[0] if heads and self.dst_scales.shape.head_stride else 1

    @property
    def converts(self) -> bool:
        """Whether numbers change on their way."""
        return self.factors is not None

    @property
    def run_nbytes(self) -> int:
        """Bytes at the destination of one token, or of one slot without tokens."""
        return math.prod(step.size for step in self.steps) * self.elements * self.dst_elem

    def chosen(self, layers: Collection[int]) -> npt.NDArray[np.bool_]:
        """Which entries are of these layers."""
        return np.isin(self.layer, np.fromiter(layers, np.int64, len(layers)))


@dataclasses.dataclass(frozen=True, eq=False)
class TablePair:
    """Bundles that share a block table on each side.

    Attributes:
        src_group, dst_group: positions in the layouts' groups.
        kind, window: of the group.
        src_tokens, dst_tokens: of a block; 0 for state.
        unit: tokens of the largest stretch that never leaves a block on either side; 0 for state.
        aligned: whether a transfer must begin at a block boundary of the destination, and why.
    """

    src_group: int
    dst_group: int
    kind: str
    window: int
    src_tokens: int
    dst_tokens: int
    unit: int
    src_slots: int
    dst_slots: int
    src_null: int | None
    dst_null: int | None
    copy_groups: tuple[CopyGroup, ...]
    aligned: str = ""
