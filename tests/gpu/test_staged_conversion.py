"""Numbers of GPU caches that change their type over transports that stage, and change their layout."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kvferry.engine.convert import conversion
from kvferry.engine.errors import Cancelled, PlanError
from kvferry.engine.layout.dtypes import QUANTISED
from kvferry.engine.transfer_engine import TransferEngine
from kvferry.kernels.cast import cast_reference
from tests.support.caches import PagedPool, expect_tokens
from tests.support.scaled_caches import NUM_BLOCKS, Scaled, expect

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvferry.engine.link.link import Link
    from tests.gpu.conftest import GpuPeer

pytestmark = pytest.mark.gpu

NHD = ("plane", "block", "token", "head", "dim")
HND = ("plane", "block", "head", "token", "dim")
FP8, INT8, BF16 = torch.float8_e4m3fn, torch.int8, torch.bfloat16
TABLES = [np.random.default_rng(i).permutation(NUM_BLOCKS).tolist() for i in (1, 2)]
# Between two GPUs cuda_ipc converts in the kernel that moves: what it stages has one end in the host.
WAYS = [
    *((name, ends) for name in ("cma", "tcp") for ends in ("gpu gpu", "gpu host", "host gpu")),
    ("cuda_ipc", "gpu host"),
    ("cuda_ipc", "host gpu"),
]
PAIRS = [
    ("bfloat16", "float8_e4m3fn"),
    ("float8_e4m3fn", "bfloat16"),
    ("float16", "int8"),
    ("int8", "float32"),
    ("float32", "float8_e5m2"),
]


@pytest.fixture(params=WAYS, ids=" ".join)
def way(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A transport, and where the source and the destination are."""
    value: tuple[str, str] = request.param
    return value


@pytest.fixture
def link(engine: TransferEngine, peer: GpuPeer, way: tuple[str, str]) -> Any:
    # GPU memory is registered before connect(), which prepares what it will need.
    holder = torch.zeros(1, dtype=torch.uint8, device="cuda")
    region = engine.register(holder)
    fresh = engine.connect(peer.address, transport=way[0])
    assert peer.call("accept", engine.engine_id) == way[0]
    yield fresh
    fresh.close()
    region.deregister()


def move(
    engine: TransferEngine,
    link: Link,
    peer: GpuPeer,
    sides: tuple[Any, Any],
    span: tuple[int, int],
    ends: str,
    write: bool,
    *,
    tables: Any = TABLES,
    prepared: bool = False,
) -> list[np.ndarray[Any, Any]]:
    """Moves tokens, compares what is counted, and returns the destination's bytes."""
    src, dst = sides
    places = ends.split() if write else ends.split()[::-1]
    mine, theirs = (src, dst) if write else (dst, src)
    arrays = mine.arrays()
    own = [torch.from_numpy(array.copy()) for array in arrays]
    own = [tensor.cuda() for tensor in own] if places[0] == "gpu" else own
    local = engine.register_cache(mine.layout, own)
    register = "cache_of" if places[1] == "gpu" else "host_cache_of"
    remote = peer.call(register, theirs.arrays(), theirs.layout)
    plan = engine.plan(local, remote) if write else engine.plan(remote, local)
    if prepared:
        link.prepare(plan)
    start, stop = span
    nbytes = plan.tokens.nbytes(start, stop)
    if write:
        imm = peer.call("new_imm")
        ticket = peer.call("expect", imm, nbytes=nbytes)
        sent = link.write_tokens(plan, *tables, start=start, stop=stop, imm=imm)
        assert sent.wait(60) == nbytes
        assert peer.call("wait", ticket) == nbytes
        got = list(peer.call("peek_cache"))
    else:
        link.read_tokens(plan, *tables, start=start, stop=stop).wait(60)
        got = [tensor.cpu().numpy() for tensor in own]
    local.deregister()
    return got


def pools(
    dtypes: tuple[str, str], *, by_head: bool, tokens: tuple[int, int], dim: int, blocks: int
) -> tuple[PagedPool, PagedPool, Any]:
    """Two caches with fixed scales, and the cast between them."""
    scales, made = [], []
    for side, dtype in enumerate(dtypes):
        drawn = np.random.default_rng(side).uniform(0.02, 0.2, (2, 3, 4)).astype(np.float32)
        drawn = drawn if by_head else drawn[:, :, :1]
        scales.append(drawn if dtype in QUANTISED else np.ones_like(drawn))
        made.append(
            PagedPool.make(
                (NHD, HND)[side],
                layers=(0, 1, 2),
                num_blocks=blocks,
                tokens=tokens[side],
                heads=(0, 4),
                dim=dim,
                stacked=False,
                dtype=getattr(torch, dtype),
                seed=None if side else 3,
                scales={"k": drawn[0], "v": drawn[1]} if dtype in QUANTISED else None,
            )
        )

    def cast(numbers: torch.Tensor, layer: int) -> torch.Tensor:
        factor = torch.from_numpy(scales[0][:, layer] / scales[1][:, layer])[:, :, None]
        return cast_reference(numbers, factor, made[1].tensors[0].dtype)

    return made[0], made[1], cast


def planned(
    engine: TransferEngine, peer: GpuPeer, transport: str, sides: tuple[Any, Any], own: Any
) -> tuple[Any, Any, Any]:
    """Tensors of this side as the source's cache, a link, and a plan for writing."""
    src, dst = sides
    local = engine.register_cache(src.layout, own)
    link = engine.connect(peer.address, transport=transport)
    peer.call("accept", engine.engine_id)
    return local, link, engine.plan(local, peer.call("cache_of", dst.arrays(), dst.layout))


def check(got: list[np.ndarray[Any, Any]], truth: list[np.ndarray[Any, Any]]) -> None:
    for mine, then in zip(got, truth, strict=True):
        assert np.array_equal(mine, then)


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize("by_head", [True, False])
@pytest.mark.parametrize("dtypes", PAIRS, ids=" to ".join)
def test_numbers_change_their_type_as_torch_casts_them(
    engine: TransferEngine,
    link: Link,
    peer: GpuPeer,
    way: tuple[str, str],
    dtypes: tuple[str, str],
    by_head: bool,
    write: bool,
) -> None:
    src, dst, cast = pools(dtypes, by_head=by_head, tokens=(4, 6), dim=24, blocks=NUM_BLOCKS)
    truth = expect_tokens(src, dst, TABLES[0], TABLES[1], 5, 47, cast=cast)
    check(move(engine, link, peer, (src, dst), (5, 47), way[1], write), truth.arrays())


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize(
    "case",
    [
        (NHD, 4, BF16, HND, 6, FP8, True),
        (NHD, 4, BF16, NHD, 8, INT8, False),
        (HND, 6, FP8, NHD, 4, BF16, True),
        (NHD, 4, INT8, HND, 6, FP8, True),
    ],
    ids=lambda case: f"{case[2]} to {case[5]}",
)
def test_scales_of_blocks_are_chosen_written_and_used(
    engine: TransferEngine, link: Link, peer: GpuPeer, way: tuple[str, str], case: Any, write: bool
) -> None:
    src_order, src_tokens, src_type, dst_order, dst_tokens, dst_type, by_head = case
    src = Scaled(src_order, src_tokens, src_type, by_head=by_head, seed=3)
    dst = Scaled(dst_order, dst_tokens, dst_type, by_head=by_head)
    span = 2 * dst_tokens, 2 * dst_tokens + 25
    truth = expect(src, dst, TABLES, *span)
    check(move(engine, link, peer, (src, dst), span, way[1], write), truth)


@pytest.mark.parametrize("write", [True, False])
def test_many_chunks_of_long_and_short_rows(
    engine: TransferEngine,
    link: Link,
    peer: GpuPeer,
    way: tuple[str, str],
    write: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prepared beforehand; rows of 128 numbers of a head, at both ends in blocks of their own size."""
    monkeypatch.setattr(conversion, "GPU_CHUNK_NBYTES", 100_000)
    src, dst, cast = pools(
        ("bfloat16", "float8_e4m3fn"), by_head=True, tokens=(16, 64), dim=128, blocks=20
    )
    tables = [np.random.default_rng(i).permutation(20).tolist() for i in (1, 2)]
    truth = expect_tokens(src, dst, tables[0], tables[1], 7, 300, cast=cast)
    got = move(
        engine, link, peer, (src, dst), (7, 300), way[1], write, tables=tables, prepared=True
    )
    check(got, truth.arrays())


@pytest.mark.parametrize("transport", ["cma", "tcp"])
@pytest.mark.parametrize("write", [True, False])
def test_equal_types_in_other_layouts_are_moved_bit_for_bit(
    engine: TransferEngine, peer: GpuPeer, transport: str, write: bool
) -> None:
    src, dst, _ = pools(("bfloat16", "bfloat16"), by_head=False, tokens=(4, 6), dim=24, blocks=14)
    truth = expect_tokens(src, dst, TABLES[0], TABLES[1], 5, 47)
    link = engine.connect(peer.address, transport=transport)
    peer.call("accept", engine.engine_id)
    for ends in ("gpu gpu", "gpu host", "host gpu"):
        check(move(engine, link, peer, (src, dst), (5, 47), ends, write), truth.arrays())
    link.close()


@pytest.mark.parametrize("transport", ["cma", "tcp"])
def test_numbers_are_converted_only_after_they_were_computed(
    engine: TransferEngine, peer: GpuPeer, transport: str
) -> None:
    src, dst, cast = pools(
        ("bfloat16", "float8_e4m3fn"), by_head=False, tokens=(4, 6), dim=24, blocks=14
    )
    own = [torch.zeros(len(array), dtype=torch.uint8, device="cuda") for array in src.arrays()]
    wanted = [torch.from_numpy(array).cuda() for array in src.arrays()]
    local, link, plan = planned(engine, peer, transport, (src, dst), own)
    link.prepare(plan)
    imm = peer.call("new_imm")
    arrival = peer.call("expect", imm, nbytes=plan.tokens.nbytes(0, 48))
    compute = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    with torch.cuda.stream(compute):
        torch.cuda._sleep(400_000_000)  # type: ignore[no-untyped-call]
        for mine, then in zip(own, wanted, strict=True):
            mine.copy_(then)
        ticket = link.write_tokens(plan, *TABLES, stop=48, imm=imm, stream=compute)
    assert not ticket.done()  # the host waited for nothing
    ticket.wait(60)
    peer.call("wait", arrival)
    truth = expect_tokens(src, dst, TABLES[0], TABLES[1], 0, 48, cast=cast)
    check(list(peer.call("peek_cache")), truth.arrays())
    stopped = link.write_tokens(plan, *TABLES, stop=48)
    stopped.cancel()
    with contextlib.suppress(Cancelled):  # it may have been faster
        stopped.wait(60)
    link.close()
    local.deregister()


def test_verified_bytes_are_converted_too(
    start_peer: Callable[..., GpuPeer], peer_device: int
) -> None:
    careful = start_peer(peer_device, name="careful", verify=True)
    src, dst, cast = pools(
        ("bfloat16", "float8_e4m3fn"), by_head=True, tokens=(4, 6), dim=24, blocks=14
    )
    truth = expect_tokens(src, dst, TABLES[0], TABLES[1], 5, 47, cast=cast)
    with TransferEngine(name="here", verify=True) as engine:  # which stages by itself
        for transport in ("cuda_ipc", "cma", "tcp"):
            link = engine.connect(careful.address, transport=transport)
            careful.call("accept", engine.engine_id)
            for write in (True, False):
                got = move(engine, link, careful, (src, dst), (5, 47), "gpu gpu", write)
                check(got, truth.arrays())
            link.close()


@pytest.mark.parametrize("transport", ["cma", "tcp"])
def test_tables_on_the_gpu_are_refused_by_name(
    engine: TransferEngine, peer: GpuPeer, transport: str
) -> None:
    src, dst, _ = pools(
        ("bfloat16", "float8_e4m3fn"), by_head=True, tokens=(4, 6), dim=24, blocks=14
    )
    own = [torch.from_numpy(array).cuda() for array in src.arrays()]
    local, link, plan = planned(engine, peer, transport, (src, dst), own)
    tables = [torch.tensor(table, device="cuda") for table in TABLES]
    with pytest.raises(PlanError, match="block tables on a GPU"):
        link.write_tokens(plan, *tables, stop=8)
    link.close()
    local.deregister()
