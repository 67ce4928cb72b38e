"""What a link is asked for: a move is one object, checked once where it is made, and passed on whole.

`BlockMove` and `TokenMove` say which blocks or tokens of one request go where; `PieceMove` is a list
of byte ranges. A path that multiplies a move out by itself takes it as it is; others get its pieces.
Numbers that change their type go through staging, in chunks (`engine/convert`).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from ..errors import PlanError
from .block_ids import check_ids, is_on_gpu
from .pieces import NO_PIECES
from .ticket import DEFAULT_TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from ..memory.descriptors import RegionDescriptor
    from ..memory.regions import MemoryRegion, RegisteredCache
    from .pieces import BoundPieces
    from .plan import TransferPlan

    Local = tuple[MemoryRegion | RegisteredCache, ...]


class Op(NamedTuple):
    """How a move is made, whatever it moves.

    Attributes:
        kind: `write`, or `read`.
        imm: what the peer counts a write's bytes under; None: not counted.
        timeout_s: deadline.
        stream: whose work so far comes before GPU memory is touched; the current one if None.
    """

    kind: str
    imm: int | None = None
    timeout_s: float = DEFAULT_TIMEOUT_S
    stream: torch.cuda.Stream | None = None


class Move(Protocol):
    """What every move says of itself.

    Attributes:
        local: this engine's regions, or its cache.
        remote: the peer's regions.
        nbytes: that travel.
        listed: its list of pieces, if that is what it is.
    """

    @property
    def local(self) -> Local: ...
    @property
    def remote(self) -> tuple[RegionDescriptor, ...]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def listed(self) -> BoundPieces | None: ...


class PieceMove(NamedTuple):
    """Byte ranges, checked and bound to memory. As `Move`."""

    local: Local
    remote: tuple[RegionDescriptor, ...]
    listed: BoundPieces

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return self.listed.total_nbytes


NOTHING = PieceMove((), (), NO_PIECES)


class BlockMove:
    """Blocks of one cache into those of another, checked. As `Move`.

    Args:
        plan: of the two caches.
        src, dst: as `Link.write_blocks` takes them.
        layers: global layer indices; all if None.

    Attributes:
        ids: the checked ids.
        key: by which what was compiled for its plan and layers is found.

    Raises:
        BlockOutOfRange, OverlappingBlocks, PlanError: the ids, or the plan is not for blocks.
    """

    __slots__ = ("ids", "key", "layers", "local", "nbytes", "plan", "remote")

    listed = None

    def __init__(
        self, plan: TransferPlan, src: Any, dst: Any, layers: Sequence[int] | None
    ) -> None:
        self.layers = layers = None if layers is None else tuple(layers)
        self.ids = ids = check_ids(plan, src, dst)
        self.plan = plan
        self.local = plan.caches
        self.remote = plan.remote.regions
        self.key = (id(plan), layers)
        self.nbytes = ids.num_blocks * plan.block_nbytes(layers)

    @property
    def on_gpu(self) -> bool:
        """Whether its ids lie on a GPU, unread."""
        return self.ids.on_gpu

    def pieces(self) -> BoundPieces:
        """List every piece: its address here and its range there."""
        return self.plan.list_pieces(self.ids.src, self.ids.dst, self.layers)


class TokenMove:
    """Tokens `[start, stop)` of a request between blocks of any two caches. As `Move`.

    Its tables are checked when its bytes are first asked for, or its pieces: before any byte moves.

    Args:
        plan: of the two caches.
        src_tables, dst_tables: a block table for each group of the side's layout, from the request's
            first token on, or the one table; over `cuda_ipc` also tensors on the GPU.
        layers: global layer indices; all if None.

    Attributes:
        on_gpu: whether any of its tables lies on a GPU, unread.
    """

    listed = None

    def __init__(
        self,
        plan: TransferPlan,
        src_tables: Any,
        dst_tables: Any,
        start: int,
        stop: int,
        layers: Sequence[int] | None = None,
    ) -> None:
        self.plan = plan
        self.local = plan.caches
        self.remote = plan.remote.regions
        self.src_tables, self.dst_tables = as_tables(src_tables), as_tables(dst_tables)
        self.start, self.stop = start, stop
        self.layers = None if layers is None else tuple(layers)
        self.on_gpu = any(map(is_on_gpu, (*self.src_tables, *self.dst_tables)))

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes that travel.

        Raises:
            BlockOutOfRange, OverlappingBlocks, PlanError: the tables; as for `TokenPlan.moves`.
        """
        tokens, tables = self.plan.tokens, (*self.src_tables, *self.dst_tables)
        states = 1
        if not self.on_gpu:
            for pair in tokens.pairs:
                tokens.check(pair, self.src_tables, self.dst_tables, self.start, self.stop)
            states = states_of(self.plan, self.dst_tables)
        elif not all(map(is_on_gpu, tables)) or any(
            not pair.unit or pair.aligned for pair in tokens.pairs
        ):
            raise PlanError(
                "block tables on a GPU must all be there, and name blocks of tokens: give tables of "
                "state in host memory"
            )
        return tokens.nbytes(self.start, self.stop, layers=self.layers, states=states)

    def pieces(self) -> BoundPieces:
        """List every piece of a plan that moves bits: its address here and its range there.

        Raises:
            BlockOutOfRange, OverlappingBlocks, PlanError: as for `nbytes`.
        """
        plan, tables = self.plan, (self.src_tables, self.dst_tables)
        return plan.bind(plan.tokens.pieces(*tables, self.start, self.stop, layers=self.layers))


def as_tables(tables: Any) -> tuple[Any, ...]:
    """Return block tables as a tuple; a single table may be given as it is."""
    if hasattr(tables, "ndim") and hasattr(tables, "shape"):
        return (tables,)
    several: tuple[Any, ...] = tuple(tables)
    one = all(isinstance(entry, int | np.integer) for entry in several)
    return (several,) if one else several


def states_of(plan: TransferPlan, dst_tables: Sequence[Any]) -> int:
    """Count the pages of state that the destination's tables name."""
    counts = {
        len(dst_tables[pair.dst_group])
        - int(
            pair.dst_null is not None
            and np.count_nonzero(np.asarray(dst_tables[pair.dst_group]) == pair.dst_null)
        )
        for pair in plan.tokens.pairs
        if not pair.unit and pair.dst_group < len(dst_tables)
    }
    if len(counts) > 1:
        raise PlanError(f"groups of state have {sorted(counts)} pages")
    return counts.pop() if counts else 1
