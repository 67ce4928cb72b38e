"""A hostile world for one prefill and one decode agent, with memory that knows its owners.

The world has a network that loses, delays, reorders and duplicates, operations that land piece by
piece, timers that fire at any moment, links that break for each side at its own time, and processes
that die. Its memory knows who owns each block, so a write after free is caught when it lands, a read
of a reused source when it is read, and a completion by an old imm when it counts.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvferry.control.handoff.events import (
    CancelOperations,
    ClearTimer,
    CounterEnded,
    Expect,
    Fail,
    OperationEnded,
    Quarantine,
    ReleaseBlocks,
    RetireCounter,
    Send,
    SendRefused,
    SetTimer,
    SourceFinished,
    SourceOffered,
    SourceReady,
    StartRead,
    StartWrite,
    Succeed,
    TearDownLink,
    TimerFired,
    UserCancelled,
)
from kvferry.control.handoff.messages import (
    FINAL_ANSWERS,
    HandoffMessage,
    decode,
    encode,
    unpack_block_ids,
)
from kvferry.control.handoff.registry import DecodeHandoffs, PrefillHandoffs
from tests.control.examples import pack_block_ids

if TYPE_CHECKING:
    from kvferry.control.errors import ControlError
    from kvferry.control.handoff.events import Action, Event
    from kvferry.control.handoff.registry import Handoffs, Steps

POOL_BLOCKS = 8
NUM_LAYERS = 2
PIECE_NBYTES = 16
REQUESTS = {"a": 1, "b": 2, "c": 3}  # how many blocks each has
OTHER = {"prefill": "decode", "decode": "prefill"}


class Pool:
    """Paged memory that knows which handoff owns each block."""

    def __init__(self) -> None:
        self.owner: list[int | None] = [None] * POOL_BLOCKS
        self.cells: dict[tuple[int, int], object] = {}

    def take(self, num_blocks: int) -> list[int]:
        return [block for block, owner in enumerate(self.owner) if owner is None][:num_blocks]

    def give(self, owner: int) -> None:
        for block, current in enumerate(self.owner):
            if current == owner:
                self.owner[block] = None
                for layer in range(NUM_LAYERS):
                    self.cells[layer, block] = "reused"


class Operation:
    """A write or read on its way, one piece at a time."""

    def __init__(self, mover: Side, key: int, op: int, session: int, imm: int | None) -> None:
        self.mover, self.key, self.op, self.session, self.imm = mover, key, op, session, imm
        self.pieces: list[tuple[int, int, int]] = []  # layer, source block, destination block
        self.num_pieces = 0
        self.cancelled = False
        self.peer_key = 0


class Side:
    """One process: a registry, its memory, and what its engine would know."""

    def __init__(self, role: str, registry: Handoffs) -> None:
        self.role = role
        self.registry = registry
        self.pool = Pool()
        self.events: list[tuple[int, Event]] = []  # of the engine, not told yet
        self.timers: set[tuple[int, str]] = set()
        self.links_up: set[int] = set()
        self.links_breaking: dict[int, str] = {}  # this side has not noticed yet
        self.not_quiesced: set[int] = set()
        self.blocks: dict[int, list[int]] = {}
        self.outcomes: dict[int, Succeed | Fail] = {}
        self.released: set[int] = set()
        self.counters: dict[int, tuple[int, int]] = {}  # imm: (key, bytes still missing)
        self.requested: dict[int, tuple[str, int]] = {}  # decode: request id, skipped blocks
        self.offers: dict[int, tuple[str, int]] = {}  # prefill: request id, next layer


class World(RuleBasedStateMachine):
    """Two agents, and everything that can go wrong between them."""

    seen: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.session = 0
        self.network: list[tuple[str, bytes]] = []
        self.late: list[tuple[str, bytes]] = []
        self.operations: list[Operation] = []
        self.refuse_next_send = False
        self.attempts: Counter[str] = Counter()
        self.sides = {role: self._new_side(role) for role in ("prefill", "decode")}
        self.one_sided = False

    @initialize(one_sided=st.booleans())
    def begin(self, one_sided: bool) -> None:
        self.one_sided = one_sided  # whether a live process outlasts its link, as with `cma`
        self._connect()

    def _new_side(self, role: str) -> Side:
        return Side(role, PrefillHandoffs() if role == "prefill" else DecodeHandoffs())

    def _connect(self) -> None:
        self.session += 1
        for side in self.sides.values():
            side.registry.open_session(self.session, OTHER[side.role])
            # Hardly an answer is remembered, so that forgetting is tried too.
            side.registry._ledgers[self.session]._remembered = 1
            side.links_up.add(self.session)

    # What users do -------------------------------------------------------------------------------

    @rule(
        request_id=st.sampled_from(sorted(REQUESTS)),
        mode=st.sampled_from(["push", "pull"]),
        skip=st.sampled_from([0, 0, 0, 1]),
    )
    def receive(self, request_id: str, mode: str, skip: int) -> None:
        side = self.sides["decode"]
        num_blocks = max(0, REQUESTS[request_id] - skip)
        blocks = side.pool.take(num_blocks)
        if len(blocks) < num_blocks or not num_blocks or self.session not in side.links_up:
            return
        self.attempts[request_id] += 1
        imm = next(imm for imm in range(1, 100) if imm not in side.counters)
        assert isinstance(side.registry, DecodeHandoffs)
        key, steps = side.registry.begin(
            self.session,
            request_id,
            attempt=self.attempts[request_id],
            mode=mode,  # type: ignore[arg-type]
            imm=imm,
            num_blocks=num_blocks,
            nbytes=num_blocks * NUM_LAYERS * PIECE_NBYTES,
            timeout_s=30.0,
            tables=(pack_block_ids(blocks),),
            skip_blocks=skip,
        )
        side.requested[key] = (request_id, skip)
        self._own(side, key, blocks)
        self._carry_out(side, steps)

    @rule(request_id=st.sampled_from(sorted(REQUESTS)), wrong=st.sampled_from([0, 0, 0, 0, 1]))
    def offer(self, request_id: str, wrong: int) -> None:
        self._offer(request_id, REQUESTS[request_id] + wrong)

    def _offer(self, request_id: str, num_blocks: int) -> int | None:
        """Returns the handoff's key; None when there is no memory for it."""
        side = self.sides["prefill"]
        blocks = side.pool.take(num_blocks)
        if len(blocks) < num_blocks:
            return None
        for index, block in enumerate(blocks):
            for layer in range(NUM_LAYERS):
                side.pool.cells[layer, block] = ("not computed", index)
        source = SourceOffered((pack_block_ids(blocks),), NUM_LAYERS, 30.0)
        assert isinstance(side.registry, PrefillHandoffs)
        key, steps = side.registry.offer(request_id, source)
        side.offers[key] = (request_id, 0)
        self._own(side, key, blocks)
        self._carry_out(side, steps)
        return key

    @precondition(lambda self: self.sides["prefill"].offers)
    @rule(pick=st.integers(0, 9), layers=st.integers(1, NUM_LAYERS))
    def compute(self, pick: int, layers: int) -> None:
        keys = list(self.sides["prefill"].offers)
        self._compute(keys[pick % len(keys)], layers)

    def _compute(self, key: int, layers: int) -> None:
        side = self.sides["prefill"]
        request_id, first = side.offers[key]
        last = min(first + layers, NUM_LAYERS)
        if key not in side.released:
            for index, block in enumerate(side.blocks[key]):
                for layer in range(first, last):
                    side.pool.cells[layer, block] = (request_id, layer, index)
        side.offers[key] = (request_id, last)
        self._tell(side, key, SourceReady((first, last)))
        if last == NUM_LAYERS:
            del side.offers[key]
            self._tell(side, key, SourceFinished())

    @rule(role=st.sampled_from(["prefill", "decode"]), pick=st.integers(0, 9))
    def cancel(self, role: str, pick: int) -> None:
        side = self.sides[role]
        keys = [key for key in side.blocks if key not in side.outcomes]
        if keys:
            self._tell(side, keys[pick % len(keys)], UserCancelled())

    @rule(
        request_id=st.sampled_from(sorted(REQUESTS)),
        mode=st.sampled_from(["push", "pull"]),
        computed=st.sampled_from([0, 1, NUM_LAYERS, NUM_LAYERS]),
        steps=st.integers(0, 12),
    )
    def begin_handoff(self, request_id: str, mode: str, computed: int, steps: int) -> None:
        """A whole handoff sets out: trouble then finds it anywhere on its way."""
        self.receive(request_id, mode, 0)
        key = self._offer(request_id, REQUESTS[request_id])
        if computed and key is not None:
            self._compute(key, computed)
        self.go_on(steps)

    @rule(steps=st.integers(1, 12))
    def go_on(self, steps: int) -> None:
        """A while without trouble."""
        for _ in range(steps):
            self._go_on()

    def _go_on(self) -> bool:
        """One step without trouble; False when there is nothing to do."""
        for side in self.sides.values():
            if side.events:
                self._tell(side, *side.events.pop(0))
                return True
        if self.network:
            self._receive(*self.network.pop(0))
        elif self.operations:
            self._move(self.operations[0], self.operations[0].cancelled)
        else:
            return False
        return True

    # What the network does -----------------------------------------------------------------------

    @precondition(lambda self: self.network)
    @rule(pick=st.integers(0, 9), fate=st.sampled_from(["lost", "late", "late", "twice", "twice"]))
    def mistreat(self, pick: int, fate: str) -> None:
        """A message is lost or delayed, or a copy of it is delayed."""
        index = pick % len(self.network)
        if fate != "lost":
            self.late.append(self.network[index])
        if fate != "twice":
            del self.network[index]

    @precondition(lambda self: self.late)
    @rule(pick=st.integers(0, 9))
    def deliver_late(self, pick: int) -> None:
        self._receive(*self.late.pop(pick % len(self.late)))

    @precondition(lambda self: self.network)
    @rule(pick=st.integers(0, 9))
    def deliver_out_of_order(self, pick: int) -> None:
        self._receive(*self.network.pop(pick % len(self.network)))

    @rule(refuse=st.sampled_from([True, False, False, False]))
    def fill_queue(self, refuse: bool) -> None:
        self.refuse_next_send = refuse

    def _receive(self, to: str, frame: bytes) -> None:
        message = decode(frame)
        assert isinstance(message, HandoffMessage)
        side = self.sides[to]
        if side.registry.knows(message.session):
            self._carry_out(side, side.registry.receive(message))

    # What the engines do -------------------------------------------------------------------------

    @precondition(lambda self: self.operations)
    @rule(pick=st.integers(0, 9), fail=st.sampled_from([False] * 5 + [True]))
    def move(self, pick: int, fail: bool) -> None:
        self._move(self.operations[pick % len(self.operations)], fail)

    def _move(self, operation: Operation, fail: bool) -> None:
        if fail or (operation.pieces and not self._can_land(operation)):
            self._end(operation, OSError("the write failed"))
        elif operation.pieces:
            self._land(operation)
        else:
            self._end(operation, None)

    def _can_land(self, operation: Operation) -> bool:
        if self.one_sided:
            return operation.session in operation.mover.links_up
        return all(operation.session in side.links_up for side in self.sides.values())

    def _end(self, operation: Operation, error: Exception | None) -> None:
        self.operations.remove(operation)
        nbytes = operation.num_pieces * PIECE_NBYTES
        event = OperationEnded(operation.op, nbytes, error) if error is None else None
        operation.mover.events.append(
            (operation.key, event or OperationEnded(operation.op, 0, error))
        )

    def _land(self, operation: Operation) -> None:
        layer, src_block, dst_block = operation.pieces.pop(0)
        prefill, decoder = self.sides["prefill"], self.sides["decode"]
        src_key, dst_key = operation.key, operation.peer_key
        if operation.mover is decoder:
            src_key, dst_key = dst_key, src_key
        assert prefill.pool.owner[src_block] == src_key, "a source block was read after its release"
        assert decoder.pool.owner[dst_block] == dst_key, "a destination was written after release"
        decoder.pool.cells[layer, dst_block] = prefill.pool.cells[layer, src_block]
        if operation.imm is not None:
            self._count(decoder, operation)

    def _count(self, decoder: Side, operation: Operation) -> None:
        assert operation.imm is not None
        if operation.imm not in decoder.counters:
            return
        key, missing = decoder.counters[operation.imm]
        assert key == operation.peer_key, "a write of an old attempt was counted for a new one"
        missing -= PIECE_NBYTES
        decoder.counters[operation.imm] = (key, missing)
        if missing == 0:
            del decoder.counters[operation.imm]  # complete is retired: the imm may come again
            decoder.events.append((key, CounterEnded(self._nbytes(decoder, key))))

    def _nbytes(self, decoder: Side, key: int) -> int:
        return len(decoder.blocks[key]) * NUM_LAYERS * PIECE_NBYTES

    @precondition(lambda self: any(side.events for side in self.sides.values()))
    @rule(role=st.sampled_from(["prefill", "decode"]), pick=st.integers(0, 9))
    def tell_engine_event(self, role: str, pick: int) -> None:
        side = self.sides[role]
        if side.events:
            self._tell(side, *side.events.pop(pick % len(side.events)))

    @precondition(lambda self: self.sides["decode"].counters)
    @rule(pick=st.integers(0, 9))
    def fail_counter(self, pick: int) -> None:
        side = self.sides["decode"]
        imms = list(side.counters)
        if imms:
            key, _ = side.counters[imms[pick % len(imms)]]
            side.events.append((key, CounterEnded(error=OSError("the peer aborted this imm"))))

    # What time does ------------------------------------------------------------------------------

    @precondition(lambda self: any(side.timers for side in self.sides.values()))
    @rule(
        role=st.sampled_from(["prefill", "decode"]),
        pick=st.integers(0, 30),
        kind=st.sampled_from(["", "retry", "drain", "recall", "teardown", "settle"]),
    )
    def fire_timer(self, role: str, pick: int, kind: str) -> None:
        side = self.sides[role]
        timers = [timer for timer in sorted(side.timers) if timer[1] == kind] or sorted(side.timers)
        if timers:
            self._fire(side, *timers[pick % len(timers)])

    def _fire(self, side: Side, key: int, kind: str) -> None:
        side.timers.discard((key, kind))
        self._tell(side, key, TimerFired(kind))  # type: ignore[arg-type]

    # What breaks ---------------------------------------------------------------------------------

    @rule(first=st.sampled_from(["prefill", "decode", "", "", "", ""]))
    def break_link(self, first: str) -> None:
        """One side notices first, or nobody yet; half of the time it does not break at all."""
        if first:
            self._break(self.session, "the cable was pulled")
            self._notice(self.sides[first])

    def _break(self, session: int, reason: str) -> None:
        for side in self.sides.values():
            if session in side.links_up:
                side.links_breaking.setdefault(session, reason)

    @precondition(lambda self: any(side.links_breaking for side in self.sides.values()))
    @rule(role=st.sampled_from(["prefill", "decode"]))
    def notice_broken_link(self, role: str) -> None:
        self._notice(self.sides[role])

    def _notice(self, side: Side) -> None:
        for session, reason in list(side.links_breaking.items()):
            del side.links_breaking[session]
            self._link_down(side, session, reason, quiesced=not self.one_sided)

    def _link_down(self, side: Side, session: int, reason: str, *, quiesced: bool) -> None:
        side.links_up.discard(session)
        if not quiesced:
            side.not_quiesced.add(session)
        self._carry_out(side, side.registry.link_down(session, reason, quiesced=quiesced))

    @precondition(lambda self: not any(side.links_up for side in self.sides.values()))
    @rule()
    def connect_again(self) -> None:
        self._connect()

    @rule(role=st.sampled_from(["prefill", "decode", "", "", "", ""]))
    def die(self, role: str) -> None:
        if not role:
            return
        dead, survivor = self.sides[role], self.sides[OTHER[role]]
        self.operations = [op for op in self.operations if op.mover is not dead]
        # What the survivor was moving to or from the dead process ends with an error.
        for operation in list(self.operations):
            self._end(operation, ConnectionError("the peer's process is gone"))
        self.sides[role] = self._new_side(role)
        for session in sorted(survivor.links_up):
            survivor.links_breaking.pop(session, None)
            self._link_down(survivor, session, "the process is gone", quiesced=True)
        for session in sorted(survivor.not_quiesced):
            self._carry_out(survivor, survivor.registry.quiesced(session))
        survivor.not_quiesced.clear()
        self._connect()

    # Carrying out actions ------------------------------------------------------------------------

    def _own(self, side: Side, key: int, blocks: list[int]) -> None:
        side.blocks[key] = blocks
        for block in blocks:
            side.pool.owner[block] = key

    def _tell(self, side: Side, key: int, event: Event) -> None:
        self._carry_out(side, side.registry.handle(key, event))

    def _carry_out(self, side: Side, steps: Steps) -> None:
        for key, action in steps:
            if isinstance(action, Succeed) and side.role == "decode":
                self._check_bytes(side, key)
        for key, action in steps:
            self.seen[type(action).__name__] += 1
            self._do(side, key, action)

    def _do(self, side: Side, key: int, action: Action) -> None:
        match action:
            case Send(message=message):
                self._send(side, key, message)
            case SetTimer(kind=kind):
                side.timers.add((key, kind))
            case ClearTimer(kind=kind):
                side.timers.discard((key, kind))
            case Expect(imm=imm, nbytes=nbytes):
                assert imm not in side.counters, "an imm was reused while its counter lives"
                side.counters[imm] = (key, nbytes)
            case RetireCounter(imm=imm):
                side.counters.pop(imm, None)
            case StartWrite(op=op, request=request, tables=tables, layers=layers):
                self._start(side, key, op, request.session, tables, request.tables, layers)
                self.operations[-1].imm = request.imm
                self._link_peer(request)
            case StartRead(op=op, ready=ready):
                whole = (0, NUM_LAYERS)
                blocks = (pack_block_ids(side.blocks[key]),)
                self._start(side, key, op, ready.session, ready.tables, blocks, whole)
                self._link_peer(ready)
            case CancelOperations():
                for operation in self.operations:
                    if operation.mover is side and operation.key == key:
                        operation.cancelled = True
            case ReleaseBlocks():
                self._release(side, key)
            case Succeed() | Fail():
                self._outcome(side, key, action)
            case TearDownLink(session=session, reason=reason):
                self._break(session, reason)
            case Quarantine():
                assert key not in side.released
            case _:
                pytest.fail(f"unknown action {action}")

    def _check_bytes(self, decoder: Side, key: int) -> None:
        """Before its blocks go to their reader, they hold the whole request."""
        request_id, skip = decoder.requested[key]
        for index, block in enumerate(decoder.blocks[key]):
            for layer in range(NUM_LAYERS):
                found = decoder.pool.cells.get((layer, block))
                assert found == (request_id, layer, index + skip), "success without the bytes"

    def _send(self, side: Side, key: int, message: object) -> None:
        assert isinstance(message, HandoffMessage)
        if isinstance(message, FINAL_ANSWERS):
            self._check_nothing_moves(side, message)
        if self.refuse_next_send:
            self.refuse_next_send = False
            if key:
                side.events.append((key, SendRefused("the queue is full")))
        else:
            self.network.append((OTHER[side.role], encode(message)))

    def _check_nothing_moves(self, side: Side, message: HandoffMessage) -> None:
        for operation in self.operations:
            if operation.mover is side and operation.session == message.session:
                machine = side.registry.machines.get(operation.key)
                moving = machine is not None and machine.handoff.serial == message.handoff.serial
                assert not moving, "a final answer was given while bytes still move"

    def _start(
        self,
        side: Side,
        key: int,
        op: int,
        session: int,
        src_tables: tuple[bytes, ...],
        dst_tables: tuple[bytes, ...],
        layers: tuple[int, int],
    ) -> None:
        assert key not in side.released, "an operation was started on released blocks"
        operation = Operation(side, key, op, session, None)
        src, dst = unpack_block_ids(src_tables[0]), unpack_block_ids(dst_tables[0])
        assert len(src) == len(dst)
        operation.pieces = [
            (layer, *pair) for layer in range(*layers) for pair in zip(src, dst, strict=True)
        ]
        operation.num_pieces = len(operation.pieces)
        self.operations.append(operation)

    def _link_peer(self, message: HandoffMessage) -> None:
        """Notes which handoff of the peer the last operation touches."""
        operation = self.operations[-1]
        peer = self.sides[OTHER[operation.mover.role]]
        serial = message.handoff.serial
        ledger = peer.registry._ledgers.get(message.session)
        operation.peer_key = ledger.live.get(serial, -1) if ledger is not None else -1

    def _release(self, side: Side, key: int) -> None:
        assert key not in side.released, "blocks were released twice"
        side.released.add(key)
        for operation in self.operations:
            touches = operation.key if operation.mover is side else operation.peer_key
            if touches == key and operation.pieces and self._can_land(operation):
                pytest.fail("blocks were released while bytes can still move")
        side.pool.give(key)

    def _outcome(self, side: Side, key: int, outcome: Succeed | Fail) -> None:
        assert key not in side.outcomes, "a handoff had two outcomes"
        if key not in side.blocks:
            return  # a request whose source never came: nobody here waits for it
        side.outcomes[key] = outcome
        if isinstance(outcome, Fail):
            error: ControlError = outcome.error  # type: ignore[assignment]
            assert error.operation
            assert str(error)
            assert isinstance(error.retryable, bool)
        elif side.role == "decode":
            assert key in side.released
            self.seen["Succeed in decode"] += 1

    # What must always hold -----------------------------------------------------------------------

    @invariant()
    def nobody_waits_without_a_timer(self) -> None:
        for side in self.sides.values():
            for key, machine in side.registry.machines.items():
                told = {kind for owner, kind in side.timers if owner == key}
                assert told == machine.timers
                ends = told - {"retry"}  # to ask again ends nothing
                assert machine.outcome is not None or ends, f"{machine} waits for ever"

    def teardown(self) -> None:
        """Without further trouble every handoff comes to its end, and every block comes back."""
        self.refuse_next_send = False
        for _ in range(60):
            self._settle_down()
            while self.late:
                self._receive(*self.late.pop())
            self._settle_down()
            if not any(side.registry.machines for side in self.sides.values()):
                break
            for side in self.sides.values():
                for key, kind in sorted(side.timers):
                    if (key, kind) in side.timers:
                        self._fire(side, key, kind)
        for side in self.sides.values():
            assert not side.registry.machines, (
                f"{list(side.registry.machines.values())} never ended"
            )
            assert set(side.outcomes) == set(side.blocks) == side.released & set(side.blocks)
            assert side.pool.owner == [None] * POOL_BLOCKS
            assert not side.counters
            assert not side.timers

    def _settle_down(self) -> None:
        for _ in range(1000):
            for side in self.sides.values():
                self._notice(side)
            if not self._go_on():
                return
        pytest.fail("the two sides talk for ever")
