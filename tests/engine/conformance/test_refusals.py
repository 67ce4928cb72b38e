"""Conformance: bad input. Each kind has an error of its own, before any byte moves.

After each refusal the destination still holds its sentinels, the link is up and serves a good write.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from kvferry.engine.errors import (
    BlockOutOfRange,
    EngineError,
    LayoutError,
    NotRegistered,
    OutOfRange,
    OverlappingBlocks,
    PlanError,
    RegionError,
    RegionGone,
    RegionRefused,
    TransportUnavailable,
    UnknownImmOverflow,
)
from kvferry.engine.layout.kv_layout import KVLayout
from kvferry.engine.memory.descriptors import CacheDescriptor, RegionDescriptor
from kvferry.engine.transfer.counters import MAX_UNKNOWN_IMMS
from kvferry.engine.transfer_engine import TransferEngine

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvferry.engine.link.link import Link
    from kvferry.engine.transfer.ticket import Ticket
    from tests.conftest import Peer, Pool

SENTINEL = 0xA5
NBYTES = 4096


class Pair:
    """A link, a pool at each end, and the check that a refusal did no harm."""

    def __init__(self, link: Link, peer: Peer, src: Pool) -> None:
        self.link, self.peer, self.src = link, peer, src
        self.dst: RegionDescriptor = peer.call("pool", NBYTES, SENTINEL)

    def transfer(
        self, operation: str, theirs: RegionDescriptor, src: Any, dst: Any, nbytes: Any
    ) -> Ticket:
        """A write into, or a read from, a region that may be the peer's."""
        if operation == "write":
            return self.link.write(self.src.region, src, theirs, dst, nbytes)
        return self.link.read(self.src.region, dst, theirs, src, nbytes)

    def unharmed(self) -> None:
        assert (self.peer.contents(self.dst) == SENTINEL).all()
        assert self.link.error is None
        assert self.link.write(self.src.region, 0, self.dst, 0, NBYTES).wait(15.0) == NBYTES
        assert np.array_equal(self.peer.contents(self.dst), self.src.bytes)


@pytest.fixture
def pair(link: Link, peer: Peer, new_pool: Callable[..., Pool]) -> Pair:
    return Pair(link, peer, new_pool(NBYTES))


@pytest.mark.parametrize(
    ("src", "dst", "nbytes"),
    [
        (0, 1, NBYTES),
        (1, 0, NBYTES),
        (0, NBYTES, 1),
        (NBYTES, 0, 1),
        (0, -1, 1),
        (-1, 0, 1),
        (0, 0, -1),
        (0, 0, NBYTES + 1),
        (2**63 - 1, 0, 1),
        (0, 2**63 - 1, 1),
        (0, 2**64 - 1, 1),
        (0, 0, 2**63),
        ([0, 10], [0, NBYTES - 4], [10, 5]),
    ],
)
@pytest.mark.parametrize("operation", ["write", "read"])
def test_a_range_that_leaves_its_region_is_refused(
    pair: Pair, operation: str, src: Any, dst: Any, nbytes: Any
) -> None:
    with pytest.raises(OutOfRange, match="leaves a region of 4096 bytes"):
        pair.transfer(operation, pair.dst, src, dst, nbytes)
    pair.unharmed()


@pytest.mark.parametrize(
    ("src", "dst", "nbytes"),
    [
        ([0, 1, 2], [0, 1], 1),
        ([[0]], 0, 1),
        (0.5, 0, 1),
        (0, "0", 1),
        (0, 0, None),
        (0, 2**70, 1),
        ([True, False], 0, 1),
    ],
)
def test_offsets_that_are_no_row_of_integers_are_refused(
    pair: Pair, src: Any, dst: Any, nbytes: Any
) -> None:
    with pytest.raises(PlanError, match=r"one row of integers|do not go together"):
        pair.link.write(pair.src.region, src, pair.dst, dst, nbytes)
    pair.unharmed()


def test_memory_that_was_never_registered_is_refused(pair: Pair) -> None:
    array: Any = np.zeros(NBYTES, np.uint8)
    with pytest.raises(NotRegistered, match="register"):
        pair.link.write(array, 0, pair.dst, 0, 1)
    with pytest.raises(NotRegistered, match="descriptor"):
        pair.link.write(pair.src.region, 0, array, 0, 1)
    with pytest.raises(NotRegistered, match="descriptor"):
        pair.link.write(pair.src.region, 0, pair.src.region, 0, 1)  # type: ignore[arg-type]
    with TransferEngine(name="other") as other:
        foreign = other.register(array)
        with pytest.raises(NotRegistered, match="another engine"):
            pair.link.write(foreign, 0, pair.dst, 0, 1)
        with pytest.raises(NotRegistered, match="another engine"):
            pair.link.write(pair.src.region, 0, foreign.descriptor, 0, 1)
    pair.unharmed()


@pytest.mark.parametrize("operation", ["write", "read"])
@pytest.mark.parametrize(
    "lie",
    [
        {"key": bytes(16)},
        {"region_id": 10**6},
        {"key": bytes(16), "region_id": 10**6},
    ],
)
def test_a_descriptor_without_the_right_key_is_refused(
    pair: Pair, operation: str, lie: dict[str, Any]
) -> None:
    forged = msgspec.structs.replace(pair.dst, **lie)
    with pytest.raises(RegionRefused, match="not registered here under that key") as caught:
        pair.transfer(operation, forged, 0, 0, NBYTES).wait(15.0)
    assert caught.value.peer == "peer"
    assert caught.value.operation == operation
    pair.unharmed()


def test_a_descriptor_with_the_wrong_place_or_size_reaches_no_other_memory(pair: Pair) -> None:
    neighbour = pair.peer.call("pool", NBYTES, SENTINEL)
    moved = msgspec.structs.replace(pair.dst, address=neighbour.address)
    larger = msgspec.structs.replace(pair.dst, nbytes=2 * NBYTES)
    outcomes = []
    for forged, offset in ((moved, 0), (larger, NBYTES)):
        try:
            pair.link.write(pair.src.region, 0, forged, offset, NBYTES).wait(15.0)
        except RegionError as error:
            outcomes.append(error)
    assert (pair.peer.contents(neighbour) == SENTINEL).all()
    # tcp never looks at the address: a moved descriptor is as good as the right one there.
    assert len(outcomes) == (2 if pair.link._path.asks_access else 1)
    if not pair.link._path.asks_access:
        pair.peer.call("poke", pair.dst.region_id, 0, bytes([SENTINEL]) * NBYTES)
    pair.unharmed()


def test_a_region_that_was_deregistered_before_the_link_is_refused(
    engine: TransferEngine, peer: Peer, transport: str, new_pool: Callable[..., Pool]
) -> None:
    mine, theirs = new_pool(NBYTES), peer.call("pool", NBYTES, SENTINEL)
    peer.call("deregister", theirs.region_id)
    link = engine.connect(peer.address, transport=transport)
    with pytest.raises(RegionError, match="not registered"):
        link.write(mine.region, 0, theirs, 0, NBYTES).wait(15.0)
    with pytest.raises(RegionError, match="not registered"):
        link.read(mine.region, 0, theirs, 0, NBYTES).wait(15.0)
    assert (peer.contents(theirs) == SENTINEL).all()
    link.close()


def test_a_refused_write_ends_the_expectation_at_the_receiver(pair: Pair) -> None:
    imm = pair.peer.call("new_imm")
    ticket = pair.peer.call("expect", imm, nbytes=NBYTES)
    forged = msgspec.structs.replace(pair.dst, key=bytes(16))
    with pytest.raises(RegionRefused):
        pair.link.write(pair.src.region, 0, forged, 0, NBYTES, imm=imm).wait(15.0)
    with pytest.raises(EngineError, match="not registered here") as caught:
        pair.peer.call("wait", ticket)
    assert caught.value.imm == imm
    pair.unharmed()


def test_a_tensor_that_is_freed_while_registered_is_noticed(
    pair: Pair, engine: TransferEngine
) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.arange(NBYTES).to(torch.uint8)
    region = engine.register(tensor)
    tensor.untyped_storage().resize_(0)
    with pytest.raises(RegionGone, match="freed or resized"):
        pair.link.write(region, 0, pair.dst, 0, NBYTES)
    with pytest.raises(RegionGone, match="freed or resized"):
        pair.link.read(region, 0, pair.dst, 0, NBYTES)
    # The peer's first use of it is refused as well, whatever the transport.
    theirs = pair.peer.call("pool", NBYTES, 1)
    ticket = pair.peer.call(
        "write", engine.engine_id, theirs.region_id, 0, region.descriptor, 0, NBYTES
    )
    with pytest.raises(RegionGone, match="freed or resized"):
        pair.peer.call("wait", ticket)
    region.deregister()
    pair.unharmed()


@pytest.mark.parametrize("imm", [-1, 2**32, 2**40])
def test_an_imm_of_more_than_32_bits_is_refused(
    pair: Pair, engine: TransferEngine, imm: int
) -> None:
    with pytest.raises(OutOfRange, match="not a 32-bit number"):
        pair.link.signal(imm)
    with pytest.raises(OutOfRange, match="not a 32-bit number"):
        engine.expect(imm, nbytes=1)
    with pytest.raises(OutOfRange, match="not a 32-bit number"):
        pair.link.abort(imm, "why")
    pair.unharmed()


def test_an_imm_may_come_from_numpy(link: Link, engine: TransferEngine, peer: Peer) -> None:
    imm: Any = np.array([peer.call("new_imm")])[0]
    ticket = peer.call("expect", imm, writes=1)
    link.signal(imm).wait()
    assert peer.call("wait", ticket) == 0


def test_the_largest_and_the_smallest_imm_work(link: Link, peer: Peer) -> None:
    for imm in (0, 2**32 - 1):
        ticket = peer.call("expect", imm, writes=1)
        link.signal(imm).wait()
        assert peer.call("wait", ticket) == 0


@pytest.mark.skipif(
    "KVFERRY_TEST_SHUFFLE" in os.environ, reason="says which arrival is the one too many"
)
def test_imms_that_nobody_expects_are_kept_up_to_a_bound(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MAX_UNKNOWN_IMMS >= 1024
    with TransferEngine(name="flood") as left, TransferEngine(name="flooded") as right:
        right._core.counters._max_unknown = 100
        bad = left.connect(right.address, transport=transport)
        there = right.accept_link(left.engine_id)
        for imm in range(1000, 1100):
            bad.signal(imm).wait()
        with TransferEngine(name="good") as third:
            good = third.connect(right.address, transport=transport)
            bad.signal(5000)
            there.quiesced.wait(15.0)
            assert isinstance(there.error, UnknownImmOverflow)
            assert there.error.imm == 5000
            assert there.error.peer == "flood"
            with pytest.raises(EngineError, match="nobody expects"):
                bad.signal(1)
            assert good.error is None  # the flood is the flooder's fault alone
            ticket = right.expect(77, writes=1)
            good.signal(77).wait()
            assert ticket.wait(15.0) == 0
        assert right.expect(1050, writes=1).wait(15.0) == 0  # what came before is still there


# Plans.


def layout_of(shape: tuple[int, ...], dims: str, **options: Any) -> tuple[KVLayout, Any]:
    array = np.full(shape, SENTINEL, np.uint8)
    return KVLayout.from_tensors(array, dims, **options), array


@pytest.fixture
def caches(engine: TransferEngine, peer: Peer) -> tuple[Any, CacheDescriptor]:
    layout, array = layout_of((3, 2, 8, 4, 2, 6), "layer plane block token head dim")
    theirs = peer.call("cache", [array], "layer plane block token head dim")
    return engine.register_cache(layout, array), theirs


@pytest.mark.parametrize(
    ("src", "dst", "error", "words"),
    [
        ([0, 1], [5, 5], OverlappingBlocks, "destination block id 5 is named twice"),
        ([0, 1, 2], [7, 0, 7], OverlappingBlocks, "destination block id 7 is named twice"),
        ([0, 8], [0, 1], BlockOutOfRange, "source block id 8 is not in a cache of 8"),
        ([0, 1], [0, 8], BlockOutOfRange, "destination block id 8 is not in a cache of 8"),
        ([-1], [0], BlockOutOfRange, "source block id -1"),
        ([0], [-1], BlockOutOfRange, "destination block id -1"),
        ([2**63], [0], BlockOutOfRange, "source block id"),
        ([0, 1], [0], PlanError, "2 source block ids but 1 destination"),
        ([0.0], [0], PlanError, "one row of integers"),
        ([[0]], [[0]], PlanError, "one row of integers"),
    ],
)
@pytest.mark.parametrize("operation", ["write", "read"])
def test_block_ids_that_no_plan_can_move(
    link: Link,
    engine: TransferEngine,
    peer: Peer,
    caches: tuple[Any, CacheDescriptor],
    operation: str,
    src: Any,
    dst: Any,
    error: type[EngineError],
    words: str,
) -> None:
    mine, theirs = caches
    out, back = engine.plan(mine, theirs), engine.plan(theirs, mine)
    with pytest.raises(error, match=words):
        link.write_blocks(out, src, dst) if operation == "write" else link.read_blocks(
            back, src, dst
        )
    assert (peer.call("peek_cache")[0] == SENTINEL).all()
    assert link.error is None
    mine.deregister()


def test_a_plan_is_for_its_own_direction_layers_and_peer(
    link: Link, engine: TransferEngine, caches: tuple[Any, CacheDescriptor]
) -> None:
    mine, theirs = caches
    out, back = engine.plan(mine, theirs), engine.plan(theirs, mine)
    with pytest.raises(PlanError, match="this plan is for reading"):
        link.write_blocks(back, [0], [0])
    with pytest.raises(PlanError, match="this plan is for writing"):
        link.read_blocks(out, [0], [0])
    with pytest.raises(PlanError, match="layer 3 is not held by both"):
        link.write_blocks(out, [0], [0], layers=[0, 3])
    with pytest.raises(NotRegistered, match="one cache of this engine"):
        engine.plan(mine, mine)
    with pytest.raises(NotRegistered, match="one cache of this engine"):
        engine.plan(theirs, theirs)
    with TransferEngine(name="stranger") as stranger:
        layout, array = layout_of((3, 2, 8, 4, 2, 6), "layer plane block token head dim")
        plan = engine.plan(mine, stranger.register_cache(layout, array).descriptor)
        with pytest.raises(NotRegistered, match="another engine"):
            link.write_blocks(plan, [0], [0])
    mine.deregister()


DIMS = "layer plane block token head dim"


@pytest.mark.parametrize(
    ("shape", "dims", "options", "words"),
    [
        ((3, 2, 8, 4, 2, 7), DIMS, {}, "axis 'dim' differs: source has 6.*has 7"),
        (
            (3, 1, 8, 4, 2, 6),
            DIMS,
            {},
            "planes of layer 0 differs: source has .*k.*destination has .*latent",
        ),
        ((3, 2, 8, 4, 2, 6), DIMS, {"codec": "fp8-inline"}, "codec differs"),
        ((3, 2, 8, 4, 2, 6), DIMS, {"layers": [5, 6, 7]}, "no layer is held by both"),
        ((3, 2, 8, 4, 2, 6), DIMS, {"head_start": 2}, "no head in common"),
        ((3, 2, 8, 4, 2, 6), DIMS, {"kind": "swa"}, "group kind differs"),
        ((3, 2, 8, 4, 2, 6), DIMS, {"opaque": ["token"]}, "opaque axes differs"),
    ],
)
def test_layouts_that_cannot_be_reconciled_name_the_axis(
    engine: TransferEngine,
    peer: Peer,
    caches: tuple[Any, CacheDescriptor],
    shape: tuple[int, ...],
    dims: str,
    options: dict[str, Any],
    words: str,
) -> None:
    mine, theirs = caches
    layout, _ = layout_of(shape, dims, **options)
    regions = tuple(
        msgspec.structs.replace(r, nbytes=layout.regions[0].nbytes) for r in theirs.regions
    )
    with pytest.raises(LayoutError, match=words):
        engine.plan(mine, CacheDescriptor(layout, regions))
    mine.deregister()


def test_connecting_says_why_it_cannot(engine: TransferEngine, peer: Peer) -> None:
    with pytest.raises(
        TransportUnavailable, match="carrier-pigeon: unknown: use cuda_ipc or cma or verbs or tcp"
    ):
        engine.connect(peer.address, transport="carrier-pigeon")
    with (
        TransferEngine(name="narrow", transports=("tcp",)) as narrow,
        TransferEngine(name="slim", transports=("cma",)) as slim,
    ):
        with pytest.raises(TransportUnavailable, match="cma: not enabled in this engine"):
            narrow.connect(peer.address, transport="cma")
        with pytest.raises(
            TransportUnavailable,
            match=r"cma: not enabled in this engine.*tcp: not enabled in the peer",
        ):
            narrow.connect(slim.address)
        far = msgspec.structs.replace(
            slim.address, identity=msgspec.structs.replace(slim.address.identity, host_id="mars")
        )
        with pytest.raises(TransportUnavailable, match="cma: the peer runs on another host"):
            engine.connect(far, transport="cma")
    for options in (
        {"transports": ("carrier-pigeon",)},
        {"transports": ()},
        {"rails": 0},
        {"rails": 65},
    ):
        with pytest.raises(TransportUnavailable):
            TransferEngine(**options)
    with pytest.raises(TransportUnavailable, match=r"256\.256\.256\.256"):
        TransferEngine(host="256.256.256.256")
