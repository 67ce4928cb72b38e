"""Conformance: whole blocks between two caches, whatever their layouts, over every transport.

The truth is one NumPy assignment over named axes; both caches are compared whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvferry.engine.errors import PlanError
from kvferry.engine.layout.kv_layout import KVLayout
from kvferry.engine.transfer.block_ids import UploadedIds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvferry.engine.link.link import Link
    from kvferry.engine.memory.descriptors import CacheDescriptor
    from kvferry.engine.memory.regions import RegisteredCache
    from kvferry.engine.transfer_engine import TransferEngine
    from tests.conftest import Peer

    Array = np.ndarray[Any, Any]

SENTINEL = 0xA5A5
AXES = "layer plane block token head dim"
NHD = "plane block token head dim"
HND = "plane block head token dim"
PLANES_LAST = "block token plane head dim"
STACKED = "layer plane block token head dim"
BLOCKS_FIRST = "block layer plane token head dim"
# Odd on purpose: a slot of 210 bytes, no power of two anywhere.
SIZES = {"layer": 3, "plane": 2, "block": 13, "token": 5, "head": 3, "dim": 7}
PAIRS = [
    (NHD, NHD),
    (NHD, HND),
    (HND, NHD),
    (STACKED, NHD),
    (NHD, BLOCKS_FIRST),
    (BLOCKS_FIRST, BLOCKS_FIRST),
    (PLANES_LAST, STACKED),
]


def make(dims: str, fill: int | None, sizes: dict[str, int]) -> list[Array]:
    """The tensors of a cache: one, or one for each layer."""
    names = dims.split()
    shape = [sizes[name] for name in names]
    count = 1 if "layer" in names else sizes["layer"]
    random = np.random.default_rng(len(dims) + sizes["dim"])
    return [
        random.integers(0, 2**16, shape, np.uint16)
        if fill is None
        else np.full(shape, fill, np.uint16)
        for _ in range(count)
    ]


def view(arrays: list[Array], dims: str) -> Array:
    """A cache as one array in the order of `AXES`. A copy."""
    names = dims.split()
    if "layer" in names:
        whole: Array = arrays[0].transpose([names.index(name) for name in AXES.split()])
        return whole
    order = [names.index(name) for name in AXES.split()[1:]]
    return np.stack([array.transpose(order) for array in arrays])


class Caches:
    """A cache here and one at the peer, and the plans between them."""

    def __init__(
        self,
        engine: TransferEngine,
        peer: Peer,
        dims: tuple[str, str],
        fills: tuple[int | None, int | None],
        sizes: dict[str, int],
    ) -> None:
        self.peer, self.dims = peer, dims
        self.arrays = make(dims[0], fills[0], sizes)
        stacked = "layer" in dims[0].split()
        layout = KVLayout.from_tensors(self.arrays[0] if stacked else self.arrays, dims[0])
        self.mine: RegisteredCache = engine.register_cache(layout, self.arrays)
        self.before = view(self.arrays, dims[0]).copy()
        theirs = make(dims[1], fills[1], sizes)
        self.theirs: CacheDescriptor = peer.call("cache", theirs, dims[1])
        self.theirs_before = view(theirs, dims[1])
        self.block_nbytes = layout.block_nbytes

    def here(self) -> Array:
        return view(self.arrays, self.dims[0])

    def there(self) -> Array:
        return view(self.peer.call("peek_cache"), self.dims[1])


@pytest.fixture
def caches(engine: TransferEngine, peer: Peer) -> Iterator[Callable[..., Caches]]:
    made: list[Caches] = []

    def build(
        dims: tuple[str, str] = (NHD, NHD),
        *,
        reading: bool = False,
        sizes: dict[str, int] = SIZES,
    ) -> Caches:
        fills = (SENTINEL, None) if reading else (None, SENTINEL)
        made.append(Caches(engine, peer, dims, fills, sizes))
        return made[-1]

    yield build
    for each in made:
        each.mine.deregister()


IDS = [
    ([4], [9]),
    ([0, 1, 2, 3], [5, 6, 7, 8]),  # runs on both sides
    ([3, 2, 1, 0], [0, 1, 2, 3]),
    ([12, 0, 7, 7], [0, 12, 3, 5]),  # a source twice
    (list(range(13)), list(range(12, -1, -1))),
]


@pytest.mark.parametrize("dims", PAIRS)
@pytest.mark.parametrize("ids", IDS)
def test_blocks_are_written(
    link: Link,
    engine: TransferEngine,
    peer: Peer,
    caches: Callable[..., Caches],
    dims: tuple[str, str],
    ids: tuple[list[int], list[int]],
) -> None:
    pair = caches(dims)
    plan = engine.plan(pair.mine, pair.theirs)
    total = len(ids[0]) * pair.block_nbytes
    imm = peer.call("new_imm")
    ticket = peer.call("expect", imm, nbytes=plan.nbytes(len(ids[0])), writes=1)
    assert link.write_blocks(plan, *ids, imm=imm).wait(15.0) == total
    assert peer.call("wait", ticket) == total
    expected = pair.theirs_before.copy()
    expected[:, :, ids[1]] = pair.before[:, :, ids[0]]
    assert np.array_equal(pair.there(), expected)
    assert np.array_equal(pair.here(), pair.before)


@pytest.mark.parametrize("dims", PAIRS)
@pytest.mark.parametrize("ids", IDS)
def test_blocks_are_read(
    link: Link,
    engine: TransferEngine,
    caches: Callable[..., Caches],
    dims: tuple[str, str],
    ids: tuple[list[int], list[int]],
) -> None:
    pair = caches(dims, reading=True)
    plan = engine.plan(pair.theirs, pair.mine)
    total = len(ids[0]) * pair.block_nbytes
    assert link.read_blocks(plan, *ids).wait(15.0) == total
    expected = pair.before.copy()
    expected[:, :, ids[1]] = pair.theirs_before[:, :, ids[0]]
    assert np.array_equal(pair.here(), expected)


@pytest.mark.parametrize("layers", [[0], [2, 0], [1, 2], []])
@pytest.mark.parametrize("dims", [(NHD, HND), (STACKED, NHD), (BLOCKS_FIRST, STACKED)])
def test_some_layers_move_alone(
    link: Link,
    engine: TransferEngine,
    caches: Callable[..., Caches],
    dims: tuple[str, str],
    layers: list[int],
) -> None:
    pair = caches(dims)
    plan = engine.plan(pair.mine, pair.theirs)
    nbytes = plan.nbytes(2, layers=layers)
    assert nbytes == 2 * pair.block_nbytes * len(layers) // SIZES["layer"]
    assert link.write_blocks(plan, [3, 11], [7, 1], layers=layers).wait(15.0) == nbytes
    expected = pair.theirs_before.copy()
    for layer in layers:
        expected[layer][:, [7, 1]] = pair.before[layer][:, [3, 11]]
    assert np.array_equal(pair.there(), expected)


def test_layer_by_layer_adds_up_to_the_whole(
    link: Link, engine: TransferEngine, peer: Peer, caches: Callable[..., Caches]
) -> None:
    pair = caches((NHD, HND))
    plan = engine.plan(pair.mine, pair.theirs)
    ids = ([5, 6, 12], [0, 4, 2])
    imm = peer.call("new_imm")
    ticket = peer.call("expect", imm, nbytes=plan.nbytes(3))
    for layer in (2, 0, 1):
        assert not peer.call("done", ticket)
        link.write_blocks(plan, *ids, imm=imm, layers=[layer]).wait(15.0)
    assert peer.call("wait", ticket) == 3 * pair.block_nbytes
    expected = pair.theirs_before.copy()
    expected[:, :, ids[1]] = pair.before[:, :, ids[0]]
    assert np.array_equal(pair.there(), expected)


def test_no_blocks_are_a_write_of_nothing(
    link: Link, engine: TransferEngine, peer: Peer, caches: Callable[..., Caches]
) -> None:
    pair = caches()
    plan = engine.plan(pair.mine, pair.theirs)
    imm = peer.call("new_imm")
    ticket = peer.call("expect", imm, writes=1)
    assert link.write_blocks(plan, [], [], imm=imm).wait(15.0) == 0
    assert peer.call("wait", ticket) == 0
    assert link.read_blocks(engine.plan(pair.theirs, pair.mine), [], []).wait(15.0) == 0
    assert np.array_equal(pair.there(), pair.theirs_before)
    assert np.array_equal(pair.here(), pair.before)


def test_ids_that_only_a_kernel_checks_do_not_serve_host_memory(
    link: Link, engine: TransferEngine, caches: Callable[..., Caches]
) -> None:
    torch = pytest.importorskip("torch")
    pair = caches()
    plan = engine.plan(pair.mine, pair.theirs)
    uploaded = UploadedIds(plan, torch.tensor([[1], [SIZES["block"]]]))
    with pytest.raises(PlanError, match="ids on a GPU, or uploaded there, need GPU memory"):
        link.write_blocks(plan, uploaded)
    assert np.array_equal(pair.there(), pair.theirs_before)


def test_a_block_larger_than_a_frame(
    link: Link, engine: TransferEngine, caches: Callable[..., Caches]
) -> None:
    """One slot of 9 MiB and some: pieces that are cut."""
    sizes = {"layer": 1, "plane": 1, "block": 3, "token": 63, "head": 100, "dim": 751}
    pair = caches(sizes=sizes)
    plan = engine.plan(pair.mine, pair.theirs)
    assert link.write_blocks(plan, [2], [0]).wait(15.0) == pair.block_nbytes
    there = pair.peer.call("peek_cache")[0]
    assert np.array_equal(there[:, 0], pair.arrays[0][:, 2])
    assert (there[:, 1:] == SENTINEL).all()


def test_strided_tensors_keep_what_lies_between_their_slots(
    link: Link, engine: TransferEngine, peer: Peer
) -> None:
    """Every other slot of a larger pool: the rows between are nobody's."""
    whole = np.full((6, 4, 7), SENTINEL, np.uint16)
    cache = whole[::2]
    layout = KVLayout.from_tensors([cache], "block token dim")
    mine = engine.register_cache(layout, [cache])
    content = np.arange(3 * 4 * 7, dtype=np.uint16).reshape(3, 4, 7)
    theirs = peer.call("cache", [content], "block token dim")
    plan = engine.plan(theirs, mine)
    assert link.read_blocks(plan, [0, 2], [2, 1]).wait(15.0) == 2 * 4 * 7 * 2
    expected = np.full((6, 4, 7), SENTINEL, np.uint16)
    expected[4], expected[2] = content[0], content[2]
    assert np.array_equal(whole, expected)
    mine.deregister()
