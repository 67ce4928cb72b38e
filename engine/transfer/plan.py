"""A plan bound to memory: this engine's registered cache at one end, a peer's at the other."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from ..errors import PlanError
from ..plan.block_plan import BlockPlan
from ..plan.block_tables import have_neighbours
from ..plan.token_plan import TokenPlan
from .pieces import BoundPieces, bind
from .template import BoundTemplate

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import numpy.typing as npt

    from ..memory.descriptors import CacheDescriptor
    from ..memory.regions import RegisteredCache
    from ..plan.block_tables import Ids
    from ..plan.planes import Key
    from ..plan.template import Pieces

    Column = npt.NDArray[np.int64]


# Pieces of GPU memory from here on keep up with the link in any order of their destinations (256 MiB
# over NVLink: 366 GB/s random, 367 ordered); 8 KiB ones do not (266 and 365).
ORDERED_BELOW_NBYTES = 16 << 10


class TransferPlan:
    """How blocks move between a registered cache and a peer's. Make it once, use it for ever.

    Attributes:
        local, remote: the two caches.
        writes: True if the local one is the source.
        tokens: the pure plan between the two layouts.
        layers: global indices of the layers that it moves.
        addresses: of the local regions.
        caches: the local one alone.
        wants_order: whether block ids have to be in order of their destination.
    """

    def __init__(
        self,
        local: RegisteredCache,
        remote: CacheDescriptor,
        *,
        writes: bool,
        keys: Collection[Key] | None = None,
    ) -> None:
        self.local = local
        self.remote = remote
        self.writes = writes
        self.remote_kind = "/".join(sorted({region.kind for region in remote.regions}))
        pair = (local.layout, remote.layout) if writes else (remote.layout, local.layout)
        self.tokens = TokenPlan(*pair, keys)
        self.layers = self.tokens.layers
        self._obstacle = self.tokens.unpaired or ("" if keys is None else "only some planes move")
        self._plan = None if self._obstacle else BlockPlan(self.tokens)
        self.addresses = np.array([region.address for region in local.regions], np.int64)
        self._remote_addresses = np.array([region.address for region in remote.regions], np.int64)
        self.caches = (local,)
        self.wants_order = (
            local.device < 0
            or self._plan is None
            or bool((self._plan.template().nbytes < ORDERED_BELOW_NBYTES).any())
        )
        self._block_nbytes: dict[tuple[int, ...] | None, int] = {}
        self._bound: dict[tuple[int, ...] | None, BoundTemplate] = {}

    @property
    def blocks_pair(self) -> bool:
        """Whether `write_blocks` and `read_blocks` can use it."""
        return self._plan is not None

    @property
    def plan(self) -> BlockPlan:
        """The pure plan for lists of block ids.

        Raises:
            PlanError: a block of one side is not one of the other; tokens move, and `tokens` says how.
        """
        if self._plan is None:
            raise PlanError(
                f"blocks of the two caches do not pair one to one ({self._obstacle}): move tokens "
                "with write_tokens or read_tokens"
            )
        return self._plan

    @functools.cached_property
    def piece_nbytes(self) -> float:
        """Mean bytes of a piece where whole blocks, or whole units of tokens, move; 0 if none do."""
        if self._plan is not None:
            sizes = [self._plan.template().nbytes]
        else:
            ranges = [
                (number, stop)
                for number, pair in enumerate(self.tokens.pairs)
                for stop in sorted({0, pair.unit})
            ]
            sizes = [
                rows.elements * rows.copy_group.dst_elem
                for number, stop in ranges
                for rows in self.tokens.template(number, 0, stop, None)
            ]
        count = sum(map(len, sizes))
        return sum(int(of_some.sum()) for of_some in sizes) / count if count else 0.0

    def nbytes(self, num_blocks: int, *, layers: Sequence[int] | None = None) -> int:
        """Bytes that `num_blocks` blocks take: what the receiver must expect."""
        return self.plan.nbytes(num_blocks, layers=layers)

    def block_nbytes(self, layers: tuple[int, ...] | None) -> int:
        """Bytes that one block takes."""
        nbytes = self._block_nbytes.get(layers)
        if nbytes is None:
            nbytes = self._block_nbytes[layers] = self.plan.nbytes(1, layers=layers)
        return nbytes

    def list_pieces(self, src_ids: Ids, dst_ids: Ids, layers: Sequence[int] | None) -> BoundPieces:
        """List every piece of blocks that `check_ids` has checked: its address here, its range there."""
        bound = self.bound(src_ids, dst_ids, layers)
        if bound is not None:
            return bound.pieces(src_ids, dst_ids)
        rows = (np.asarray(src_ids, np.int64), np.asarray(dst_ids, np.int64))
        return self.bind(self.plan.multiply(*rows, layers=layers))

    def bind(self, pieces: Pieces) -> BoundPieces:
        """Bind pieces of the two layouts to memory; checks every range of the peer's."""
        here, here_offset = pieces.src_region, pieces.src_offset
        there, there_offset = pieces.dst_region, pieces.dst_offset
        if not self.writes:
            here, here_offset, there, there_offset = there, there_offset, here, here_offset
        addresses = self.addresses[here] + here_offset
        return bind(addresses, pieces.nbytes, there, there_offset, self.remote.regions)

    def bound(
        self, src_ids: Ids, dst_ids: Ids, layers: Sequence[int] | None
    ) -> BoundTemplate | None:
        """Return what multiplies these blocks out as they are; None if some form longer runs
        together, or a piece has to be cut."""
        key = None if layers is None else tuple(layers)
        bound = self._bound.get(key)
        if bound is None:
            addresses = (self.addresses, self._remote_addresses)
            template = self.plan.template(layers=layers)
            bound = self._bound[key] = BoundTemplate(template, *addresses, writes=self.writes)
        if not bound.uncut or (bound.joins and have_neighbours(src_ids, dst_ids)):
            return None
        return bound
