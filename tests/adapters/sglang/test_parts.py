"""The parts of the SGLang backend that need no SGLang: messages, pairing, heads, rooms."""

from __future__ import annotations

import importlib
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from kvferry.adapters.sglang import messages as messages
from kvferry.adapters.sglang.layout import Planner, Slice, slice_heads
from kvferry.adapters.sglang.memory import register_buffers
from kvferry.adapters.sglang.messages import Ended, Geometry, Publish, Register, frames, parse
from kvferry.adapters.sglang.prefill import check_version
from kvferry.adapters.sglang.rooms import Chunk, Part, Room
from kvferry.adapters.sglang.settings import Settings
from kvferry.control.keys import read_toml
from kvferry.engine.errors import EngineError, LayoutError, NotRegistered, ProtocolError
from kvferry.engine.memory import cuda_events
from kvferry.engine.plan.rank_plan import heads_of_rank
from kvferry.engine.transfer_engine import TransferEngine
from tests import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from kvferry.engine.link.link import Link

SENTINEL = 0xA5
PUBLISH = Publish("e", 1, "h", 2, 3, "a", b"", 0, (), 1, 0, False)


class Side:
    """An engine with a rank's buffers: pages of one byte a token, layers by their numbers."""

    def __init__(self, layers: list[int], fill: int | None = None, **geometry: Any) -> None:
        shape = (6, 4, 2, 8)
        random = np.random.default_rng(fill)
        self.kv: list[npt.NDArray[np.uint8]] = [
            np.full(shape, SENTINEL, np.uint8)
            if fill is None
            else random.integers(0, 256, shape, dtype=np.uint8)
            for _ in layers
        ]
        self.engine = TransferEngine(transports=("cma",))
        self.held = register_buffers(self.engine, kv_args(self.kv, layers))
        options: dict[str, Any] = (
            dict.fromkeys(("tp_size", "state_tp_size", "pp_size", "dcp_size"), 1)
            | dict.fromkeys(("tp_rank", "dcp_rank", "total_heads"), 0)
            | {
                "page_size": 4,
                "mla": False,
                "hybrid_mla": False,
                "swa_layout": "",
                "numbers": "fp8_e4m3",
            }
        )
        self.geometry = Geometry(**options | geometry, components=self.held.components)


def kv_args(kv: list[npt.NDArray[np.uint8]], layers: list[int], **changes: Any) -> Any:
    return SimpleNamespace(
        **{
            "kv_data_ptrs": [int(array.ctypes.data) for array in kv],
            "kv_data_lens": [array.nbytes for array in kv],
            "kv_item_lens": [array[0].nbytes for array in kv],
            "kv_layer_ids": layers,
            "aux_data_ptrs": [],
            "aux_data_lens": [],
            "aux_item_lens": [],
            "state_types": [],
            "gpu_id": 0,
        }
        | changes
    )


@pytest.fixture
def linked(request: pytest.FixtureRequest) -> Iterator[tuple[Side, Side, Link]]:
    """Prefill and decode, whose layers are `request.param`, and a link between them."""
    prefill, decode = Side(request.param[0], 7, pp_size=2), Side(request.param[1])
    yield prefill, decode, prefill.engine.connect(decode.engine.address)
    prefill.engine.close()
    decode.engine.close()


# K of all layers, then V of all: a stage of prefill, and a decode rank that also has a draft layer.
@pytest.mark.parametrize("linked", [([2, 3, 2, 3], [0, 1, 2, 3, 0, 1, 2, 3, 9, 9])], indirect=True)
def test_a_stage_of_prefill_writes_its_layers_and_no_others(linked: Any) -> None:
    prefill, decode, link = linked
    plan = Planner(prefill.held, prefill.geometry).plans(decode.geometry).kv
    assert plan is not None
    link.write_blocks(plan, [1, 4], [5, 0]).wait()
    for position, there in enumerate(decode.kv):
        expected = np.full_like(there, SENTINEL)
        if position in (2, 3, 6, 7):
            expected[[5, 0]] = prefill.kv[{2: 0, 3: 1, 6: 2, 7: 3}[position]][[1, 4]]
        assert np.array_equal(there, expected), position


@pytest.mark.parametrize("linked", [([2, 3], [0, 3])], indirect=True)
def test_a_layer_that_decode_lacks_is_named(linked: Any) -> None:
    prefill, decode, _ = linked
    with pytest.raises(LayoutError, match="layer 2 of prefill is missing at decode"):
        Planner(prefill.held, prefill.geometry).plans(decode.geometry)


@pytest.mark.parametrize("linked", [([0], [0])], indirect=True)
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"page_size": 8}, "page size differs: prefill has 4, decode has 8"),
        ({"mla": True}, "attention kind"),
        ({"dcp_size": 2}, "decode context parallelism differs"),
        (
            {"numbers": "fp8_e5m2"},
            "kv_cache_dtype differs: prefill has fp8_e4m3, decode has fp8_e5m2",
        ),
        ({"numbers": "auto"}, "kv_cache_dtype differs"),
        ({"tp_size": 2}, "number of KV heads of the model differs: prefill has 0, decode has 0"),
        ({"components": ()}, "state components"),
    ],
)
def test_what_must_be_alike_is_named(linked: Any, change: dict[str, Any], sentence: str) -> None:
    prefill, decode, _ = linked
    theirs = msgspec.structs.replace(decode.geometry, **change)
    with pytest.raises(LayoutError, match=sentence):
        Planner(prefill.held, prefill.geometry).plans(theirs)


@pytest.mark.parametrize(
    ("total", "prefill", "decode", "expected"),
    [
        (8, (2, 1), (4, 3), Slice(2, 0, 2, 4, 2)),
        (8, (4, 3), (2, 1), Slice(0, 2, 2, 2, 4)),
        (8, (4, 0), (2, 1), Slice(-4, -4, 0, 2, 4)),
        (2, (4, 2), (1, 0), Slice(0, 1, 1, 1, 2)),  # two ranks hold head 1: the first of them sends
        (2, (4, 3), (1, 0), Slice(0, 1, 0, 1, 2)),
        (2, (1, 0), (4, 3), Slice(1, 0, 1, 2, 1)),
    ],
)
def test_heads_that_both_ranks_hold(
    total: int, prefill: tuple[int, int], decode: tuple[int, int], expected: Slice
) -> None:
    def geometry(tp_size: int, tp_rank: int) -> Any:
        return SimpleNamespace(total_heads=total, tp_size=tp_size, tp_rank=tp_rank)

    found = slice_heads(geometry(*prefill), geometry(*decode))
    assert found.num_heads == expected.num_heads
    if expected.num_heads:
        assert found == expected


@pytest.mark.parametrize("total", [1, 2, 4, 8])
@pytest.mark.parametrize("sizes", [(1, 4), (2, 8), (8, 2), (4, 1), (4, 2)])
def test_every_head_of_a_decode_rank_is_written_once(total: int, sizes: tuple[int, int]) -> None:
    for decode in range(sizes[1]):
        theirs: Any = SimpleNamespace(total_heads=total, tp_size=sizes[1], tp_rank=decode)
        start, stop = heads_of_rank(total, sizes[1], decode)
        written: list[int] = []
        # As SGLang pairs ranks: those of the larger side are shared out over the smaller.
        if sizes[0] > sizes[1]:
            each = sizes[0] // sizes[1]
            sources = range(decode * each, (decode + 1) * each)
        else:
            sources = range(decode // (sizes[1] // sizes[0]), decode // (sizes[1] // sizes[0]) + 1)
        for source in sources:
            mine: Any = SimpleNamespace(total_heads=total, tp_size=sizes[0], tp_rank=source)
            part = slice_heads(mine, theirs)
            first = start + part.dst_start
            written += range(first, first + part.num_heads)
            assert (
                heads_of_rank(total, sizes[0], source)[0] + part.src_start == first
                or not part.num_heads
            )
        assert sorted(written) == list(range(start, stop))


def test_heads_that_do_not_split_are_refused() -> None:
    mine: Any = SimpleNamespace(total_heads=6, tp_size=4, tp_rank=0)
    theirs: Any = SimpleNamespace(total_heads=6, tp_size=2, tp_rank=0)
    with pytest.raises(LayoutError, match="6 KV heads are not split evenly over 4 ranks"):
        slice_heads(mine, theirs)


def test_a_state_type_that_is_not_moved_is_named() -> None:
    state = np.zeros((2, 8), np.uint8)
    args = kv_args(
        [],
        [],
        state_types=["dsa_tail"],
        state_data_ptrs=[[state.ctypes.data]],
        state_data_lens=[[16]],
        state_item_lens=[[8]],
        state_layer_ids=[[]],
    )
    with TransferEngine() as engine, pytest.raises(NotRegistered, match="'dsa_tail'"):
        register_buffers(engine, args)


def test_the_plug_in_is_declared() -> None:
    project = read_toml(ROOT / "pyproject.toml")["project"]
    (target,) = project["entry-points"]["sglang.srt.plugins"].values()
    module, name = target.split(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_messages_come_back_as_they_were() -> None:
    for message in (PUBLISH, Ended("p", 0, 7, "a", "why")):
        assert parse(frames(message)) == message


def test_foreign_frames_are_not_ours_and_broken_ones_are_named() -> None:
    assert parse([b"ABORT", b"7"]) is None
    assert parse([messages.TAG]) is None
    for broken in (b"", b"\xc1", b"\x81\xa4type\xa7publish", frames(PUBLISH)[1][:-1]):
        with pytest.raises(ProtocolError):
            parse([messages.TAG, broken])


def test_another_version_is_refused_by_name() -> None:
    geometry = Geometry(1, 1, 0, 1, 1, 1, 0, 1, False, False, "", "auto", ())
    register = Register(99, "e", 1, "h", 2, b"", geometry)
    with pytest.raises(EngineError, match=r"version 2 .* and decode 99: install equal versions"):
        check_version(register)


def test_settings_name_a_transport_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFERRY_TRANSPORTS", "tcp, cma")
    assert Settings.read().transports == ("tcp", "cma")
    monkeypatch.setenv("KVFERRY_TRANSPORTS", "pigeon")
    with pytest.raises(ValueError, match="KVFERRY_TRANSPORTS is 'pigeon'"):
        Settings.read()


class Rooms:
    """A room that counts how often it is idle."""

    def __init__(self) -> None:
        self.idle = 0
        self.room = Room(1, 5.0, self._count)

    def _count(self, _: Room) -> None:
        self.idle += 1


class Event:
    """A CUDA event, and the driver, as far as chunks wait for it."""

    cuda_event = 0xE1

    def __init__(self) -> None:
        self.waited = threading.Event()
        self.passed = threading.Event()

    def synchronize_event(self, event: int) -> None:
        assert event == self.cuda_event
        self.waited.set()
        assert self.passed.wait(30.0)


def test_a_room_is_over_when_its_last_chunk_and_all_before_it_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rooms, event = Rooms(), Event()
    monkeypatch.setattr(cuda_events, "driver", lambda: event)
    late = Chunk(np.array([1], np.int32), slice(0, 1), None, None, (None, event))
    last = Chunk(np.array([2], np.int32), slice(1, 2), 0, None)
    for _ in range(2):
        rooms.room.expect_chunk()
    thread = threading.Thread(target=rooms.room.move, args=(late,))
    thread.start()
    assert event.waited.wait(30.0)
    rooms.room.move(last)
    assert (rooms.idle, rooms.room.drained, rooms.room.claim()) == (0, False, False)
    event.passed.set()
    thread.join()
    assert (rooms.idle, rooms.room.drained) == (1, True)
    assert rooms.room.claim()
    assert not rooms.room.claim()


def test_a_room_that_fails_is_over_at_once_and_keeps_its_first_reason() -> None:
    rooms = Rooms()
    rooms.room.expect_chunk()
    rooms.room.fail("first")
    rooms.room.fail("second")
    assert rooms.room.drained
    assert rooms.room.claim()
    assert rooms.room.reason == "first"
    rooms.room.move(Chunk(np.array([1], np.int32), slice(0, 1), 0, None))
    assert not rooms.room.claim()


def test_a_dummy_part_asks_for_nothing() -> None:
    rooms = Rooms()
    rooms.room.parts["e"] = Part(msgspec.structs.replace(PUBLISH, dummy=True), None, None)
    rooms.room.expect_chunk()
    rooms.room.move(Chunk(np.array([1], np.int32), slice(0, 1), 0, None))
    assert (rooms.idle, rooms.room.reason) == (1, "")
