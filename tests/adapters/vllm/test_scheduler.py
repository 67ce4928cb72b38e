"""The scheduler side of the vLLM connector, told what vLLM's scheduler tells it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.adapters.vllm.cache import CacheGroup
from kvferry.adapters.vllm.scheduler import SchedulerSide
from kvferry.adapters.vllm.settings import Settings

BLOCK = 16
FULL = (CacheGroup(0, "full", ("model.layers.0.attn",), BLOCK),)
REMOTE = {
    "do_remote_prefill": True,
    "remote_engine_id": "p",
    "remote_host": "127.0.0.1",
    "remote_port": 7000,
    "remote_request_id": "r-1234",
}
TO_PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}


class Pool:
    """vLLM's block pool as far as the connector calls it."""

    def __init__(self, num_blocks: int) -> None:
        self.blocks = [SimpleNamespace(block_id=number, ref_cnt=0) for number in range(num_blocks)]

    def touch(self, blocks: Any) -> None:
        for block in blocks:
            block.ref_cnt += 1

    def free_blocks(self, blocks: Any) -> None:
        for block in blocks:
            block.ref_cnt -= 1

    @property
    def held(self) -> set[int]:
        """Blocks that are held, each of them once."""
        assert {block.ref_cnt for block in self.blocks} <= {0, 1}
        return {block.block_id for block in self.blocks if block.ref_cnt}


@pytest.fixture
def pool() -> Pool:
    return Pool(64)


def make_side(pool: Pool, groups: Any = FULL, role: str = "both", **settings: Any) -> SchedulerSide:
    made = SchedulerSide("me", Settings(**settings), groups=groups, tp_size=1, role=role)
    made.addresses = ["tcp://10.0.0.1:7000"]
    made.holds.bind(pool)
    return made


@pytest.fixture
def side(pool: Pool) -> SchedulerSide:
    return make_side(pool)


def request(name: str, num_tokens: int, params: Any) -> Any:
    return SimpleNamespace(
        request_id=name, num_prompt_tokens=num_tokens, kv_transfer_params=dict(params)
    )


def step(
    scheduled: dict[str, int] | None = None,
    new: Any = (),
    cached: Any = (),
    resumed: Any = (),
    preempted: Any = (),
) -> Any:
    """A `SchedulerOutput`; new and cached are `(name, blocks, computed)`.

    Blocks are one table, or a tuple of them.
    """
    scheduled = scheduled or {}

    def tables(blocks: Any) -> Any:
        return blocks if isinstance(blocks, tuple) else (blocks,)

    return SimpleNamespace(
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=sum(scheduled.values()),
        preempted_req_ids=set(preempted),
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, block_ids=tables(blocks), num_computed_tokens=computed)
            for name, blocks, computed in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[name for name, _, _ in cached],
            new_block_ids=[
                tables(blocks) if blocks is not None else None for _, blocks, _ in cached
            ],
            num_computed_tokens=[computed for _, _, computed in cached],
            resumed_req_ids=set(resumed),
        ),
    )


def test_a_prompt_in_chunks_is_opened_by_the_step_that_completes_it(side: SchedulerSide) -> None:
    side.new_request(request("a", 40, TO_PREFILL))
    assert not side.take_orders(step({"a": 16}, new=[("a", [5], 0)])).sends
    assert not side.take_orders(step({"a": 16}, cached=[("a", [9], 16)])).sends
    (send,) = side.take_orders(step({"a": 8}, cached=[("a", [2], 32)])).sends
    assert (send.handoff_id, send.tables, send.num_tokens) == ("a", [[5, 9, 2]], 40)
    assert not side.take_orders(step({"a": 1}, cached=[("a", None, 40)])).sends


def test_blocks_beyond_the_prompt_stay_here(side: SchedulerSide) -> None:
    side.new_request(request("a", 32, TO_PREFILL))
    (send,) = side.take_orders(step({"a": 32}, new=[("a", [5, 6, 7], 0)])).sends
    assert send.tables == [[5, 6]]


def test_a_finished_prompt_keeps_its_blocks_and_tells_the_router(side: SchedulerSide) -> None:
    side.new_request(prompt := request("a", 20, TO_PREFILL))
    side.take_orders(step({"a": 20}, new=[("a", [5, 6], 0)]))
    kept, params = side.request_ended(prompt, ([5, 6],), completed=True)
    assert kept
    assert params is not None
    assert params["remote_host"] == "10.0.0.1"
    assert params["remote_port"] == 7000
    assert params["remote_request_id"] == "a"
    assert params["remote_num_tokens"] == 20
    assert params["do_remote_prefill"]
    assert side.has_work
    assert side.take_orders(step()).finished_sends == ["a"]
    side.transfers_ended(["a"], [])
    assert not side.has_work


def test_an_abort_after_the_first_layer_keeps_the_blocks_until_nobody_reads_them(
    side: SchedulerSide,
) -> None:
    side.new_request(prompt := request("a", 20, TO_PREFILL))
    side.take_orders(step({"a": 20}, new=[("a", [5, 6], 0)]))
    assert side.request_ended(prompt, ([5, 6],), completed=False) == (True, None)
    assert side.take_orders(step()).cancelled_sends == ["a"]


def test_an_abort_before_that_frees_them_and_tells_who_waits(side: SchedulerSide) -> None:
    side.new_request(prompt := request("a", 40, TO_PREFILL | {"transfer_id": "t"}))
    side.take_orders(step({"a": 16}, new=[("a", [5], 0)]))
    assert side.request_ended(prompt, ([5],), completed=False) == (False, None)
    assert side.take_orders(step()).refused == ["t"]


def test_a_prompt_that_is_preempted_is_handed_over_all_the_same(
    side: SchedulerSide, pool: Pool
) -> None:
    """Its blocks are nobody else's until then, so that nothing has to be waited for."""
    side.new_request(request("a", 20, TO_PREFILL))
    side.take_orders(step({"a": 20}, new=[("a", [5, 6], 0)]))
    side.take_orders(step(preempted=["a"]))
    assert pool.held == {5, 6}
    assert not side.take_orders(step({"a": 20}, cached=[("a", [8, 3], 0)], resumed=["a"])).sends


def test_decode_loads_what_it_has_not(side: SchedulerSide) -> None:
    asked = request("d", 40, REMOTE)
    assert side.num_remote_tokens(asked, 16) == 24
    assert side.num_remote_tokens(asked, 16) == 24, "asking changes nothing"
    side.blocks_allocated(asked, ([1, 2, 3, 4],), 24)
    side.blocks_allocated(asked, ([1, 2, 3, 4],), 0)
    (receive,) = side.take_orders(step()).receives
    assert receive.tables == [[1, 2, 3]]
    assert (receive.num_local_tokens, receive.num_tokens) == (16, 40)
    assert receive.addresses == ["tcp://127.0.0.1:7000"]
    assert receive.awaited
    assert side.num_remote_tokens(asked, 0) == 0, "a preempted request is computed here"


@pytest.mark.parametrize("scheduled", [True, False])
def test_decode_tells_prefill_when_it_needs_nothing(side: SchedulerSide, scheduled: bool) -> None:
    asked = request("d", 40, REMOTE)
    if scheduled:
        side.blocks_allocated(asked, ([1, 2, 3],), 0)
    else:
        assert side.request_ended(asked, ([],), completed=False) == (False, None)
    assert side.has_work
    (receive,) = side.take_orders(step()).receives
    assert not receive.awaited
    assert receive.tables == [[]]


def test_an_abort_while_loading_is_passed_on(side: SchedulerSide) -> None:
    asked = request("d", 40, REMOTE)
    side.blocks_allocated(asked, ([1, 2, 3],), 40)
    side.take_orders(step())
    assert side.request_ended(asked, ([1, 2, 3],), completed=False) == (False, None)
    assert side.take_orders(step()).cancelled_receives == ["d"]


@pytest.mark.parametrize(
    "change",
    [
        {"remote_request_id": None},
        {"remote_host": ""},
        {"remote_port": 0},
    ],
)
def test_params_that_lead_nowhere_mean_computing_here(
    side: SchedulerSide, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    asked = request("d", 40, REMOTE | change)
    assert side.num_remote_tokens(asked, 0) == 0
    side.blocks_allocated(asked, ([1, 2, 3],), 0)
    assert not side.take_orders(step()).receives
    assert next(iter(change)) in caplog.text
    assert "request d is computed here" in caplog.text


HOSTILE: list[Any] = [
    "text",
    7,
    [1],
    {"do_remote_prefill": "yes"},
    REMOTE | {"remote_port": "x"},
    REMOTE | {"remote_port": [7000]},
    REMOTE | {"remote_port": 70000},
    REMOTE | {"remote_host": {"a": 1}},
    REMOTE | {"remote_engine_id": ["p"]},
    REMOTE | {"remote_request_id": {}},
    REMOTE | {"remote_num_tokens": "many"},
    REMOTE | {"remote_num_tokens": [40]},
    REMOTE | {"remote_agents": 3},
    REMOTE | {"remote_agents": [3]},
    REMOTE | {"remote_agents": ["tcp://127.0.0.1:7000#nokey"]},
    REMOTE | {"remote_agents": ["ipc:///tmp/x"]},
    REMOTE | {"remote_agents": ["tcp://127.0.0.1:x"]},
    REMOTE | {"remote_agents": ["tcp://127.0.0.1:7000"] * 1000},
    REMOTE | {"transfer_id": 5, "remote_request_id": None},
    TO_PREFILL | {"transfer_id": ["x"]},
]


@pytest.mark.parametrize("params", HOSTILE)
@pytest.mark.parametrize("end", ["computed", "aborted", "never asked"])
def test_whatever_a_client_says_is_computed_here(
    side: SchedulerSide, params: Any, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    asked = request("d", 40, {})
    asked.kv_transfer_params = params
    if end != "never asked":
        side.new_request(asked)
        assert side.num_remote_tokens(asked, 0) == 0
        assert not side.loads_in_step(asked)
    if end == "computed":
        side.blocks_allocated(asked, ([1, 2, 3],), 0)
        side.take_orders(step({"d": 40}, new=[("d", [1, 2, 3], 0)]))
    assert side.request_ended(asked, ([1, 2, 3],), completed=end == "computed") == (False, None)
    orders = side.take_orders(step())
    assert not orders.receives
    assert not orders.sends
    assert "request d is computed here" in caplog.text
    assert not side.has_work


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from([*REMOTE, "transfer_id", "remote_agents"]), inner)
        ),
        max_leaves=12,
    )
)
def test_no_parameters_raise(params: Any) -> None:
    side = make_side(Pool(64))
    asked = request("d", 40, {})
    asked.kv_transfer_params = params
    side.new_request(asked)
    count = side.num_remote_tokens(asked, 0)
    side.loads_in_step(asked)
    side.blocks_allocated(asked, ([1, 2, 3],), count)
    side.take_orders(step({"d": 40}, new=[("d", [1, 2, 3], 0)]))
    side.request_ended(asked, ([1, 2, 3],), completed=True)
    side.take_orders(step())


@pytest.mark.parametrize(
    ("host", "peers", "dials"),
    [
        ("127.0.0.1", (), True),
        ("10.3.2.1", (), True),
        ("8.8.8.8", (), False),
        ("169.254.169.254", (), False),
        ("prefill.example", (), False),
        ("prefill.example", ("prefill.example",), True),
        ("a.prefill.example", ("*.prefill.example",), True),
        ("8.8.8.8", ("8.8.8.0/24",), True),
        ("10.3.2.1", ("8.8.8.0/24",), False),
        ("8.8.8.8", ("*",), True),
    ],
)
def test_decode_dials_whom_its_operator_allows(
    pool: Pool, host: str, peers: tuple[str, ...], dials: bool, caplog: pytest.LogCaptureFixture
) -> None:
    given: dict[str, Any] = {"peers": peers} if peers else {}
    side = make_side(pool, **given)
    for params in (
        REMOTE | {"remote_host": host},
        REMOTE | {"remote_agents": [f"tcp://{host}:1"]},
    ):
        asked = request("d", 40, params)
        assert side.num_remote_tokens(asked, 0) == (40 if dials else 0)
        side.request_ended(asked, ([],), completed=False)
        assert [each.awaited for each in side.take_orders(step()).receives] == [False] * dials
    assert dials or f"an agent at {host}, which this engine does not dial" in caplog.text


@pytest.mark.parametrize(("role", "params"), [("decode", TO_PREFILL), ("prefill", REMOTE)])
def test_what_the_other_role_does_is_computed_here(
    pool: Pool, role: str, params: Any, caplog: pytest.LogCaptureFixture
) -> None:
    side = make_side(pool, role=role)
    side.new_request(asked := request("a", 20, params))
    assert side.num_remote_tokens(asked, 0) == 0
    side.blocks_allocated(asked, ([5, 6],), 0)
    orders = side.take_orders(step({"a": 20}, new=[("a", [5, 6], 0)]))
    assert (orders.sends, orders.receives) == ([], [])
    assert side.request_ended(asked, ([5, 6],), completed=True) == (False, None)
    assert "this engine is a kv_" in caplog.text


def test_prefill_that_has_too_few_tokens_is_told_at_once(side: SchedulerSide) -> None:
    side.new_request(asked := request("d", 40, REMOTE | {"remote_num_tokens": 39}))
    assert side.num_remote_tokens(asked, 0) == 0
    side.blocks_allocated(asked, ([1, 2, 3],), 0)
    (receive,) = side.take_orders(step()).receives
    assert not receive.awaited, "it only gives prefill's blocks back"


def test_one_of_several_answers_loads_and_the_others_are_computed(side: SchedulerSide) -> None:
    """vLLM makes a request of each of n answers, all with the same parameters."""
    first, second = request("0_d", 40, REMOTE), request("1_d", 40, REMOTE)
    side.new_request(first)
    side.new_request(second)
    assert side.num_remote_tokens(first, 0) == 40
    assert side.num_remote_tokens(second, 0) == 0
    side.blocks_allocated(first, ([1, 2, 3],), 40)
    side.blocks_allocated(second, ([4, 5, 6],), 0)
    (receive,) = side.take_orders(step()).receives
    assert receive.req_id == "0_d"


def test_prefill_offers_nothing_for_several_answers(side: SchedulerSide, pool: Pool) -> None:
    """Only one of them is told to the router: the others' blocks would stay for a lease."""
    for name in ("0_a", "1_a"):
        side.new_request(prompt := request(name, 20, TO_PREFILL))
        assert not side.take_orders(step({name: 20}, new=[(name, [5, 6], 0)])).sends
        assert side.request_ended(prompt, ([5, 6],), completed=True) == (False, None)
    assert not pool.held


def test_a_step_without_a_forward_pass_is_idle(side: SchedulerSide) -> None:
    assert side.take_orders(step()).idle
    assert not side.take_orders(step({"x": 1})).idle


def test_the_load_is_told_until_the_daemon_knows_it(pool: Pool) -> None:
    side = SchedulerSide("me", Settings(daemon="d"), groups=FULL, tp_size=1)
    free = 9
    pool.get_num_free_blocks = lambda: free  # type: ignore[attr-defined]
    side.holds.bind(pool)
    assert side.has_work, "nothing was told yet"
    side.new_request(request("a", 40, TO_PREFILL))
    orders = side.take_orders(step({"a": 16}, new=[("a", [5], 0)]))
    assert (orders.queued_tokens, orders.free_blocks) == (24, 9)
    orders = side.take_orders(step({"a": 24}, cached=[("a", [9], 16)]))
    assert orders.queued_tokens == 0
    assert not side.has_work
    free = 12  # vLLM frees blocks after a step, and falls idle
    assert side.has_work
    assert side.take_orders(step()).free_blocks == 12
    assert not side.has_work


def test_decode_tells_what_it_has_to_compute_itself() -> None:
    side = SchedulerSide("me", Settings(daemon="d"), groups=FULL, tp_size=1)
    side.new_request(request("plain", 30, {}))
    side.new_request(loaded := request("loaded", 40, REMOTE))
    side.new_request(aborted := request("aborted", 50, REMOTE))
    assert side.take_orders(step()).queued_tokens == 120
    side.blocks_allocated(loaded, ([5, 6, 7],), 40)
    assert side.take_orders(step()).queued_tokens == 81
    side.request_ended(aborted, ([],), completed=False)
    orders = side.take_orders(step({"plain": 14}, new=[("plain", [9, 8], 16)]))
    assert orders.queued_tokens == 1
    # The load failed: vLLM computes it here, in two steps.
    side.transfers_ended([], ["loaded"])
    orders = side.take_orders(step({"loaded": 25}, new=[("loaded", [5, 6, 7], 0)]))
    assert orders.queued_tokens == 15
    orders = side.take_orders(step({"loaded": 15}, cached=[("loaded", None, 25)]))
    assert orders.queued_tokens == 0
    orders = side.take_orders(step({"loaded": 1}, cached=[("loaded", None, 40)]))
    assert orders.queued_tokens == 0


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        ({"mode": "both"}, "mode"),
        ({"transports": "cma"}, "transports"),
        ({"transports": ["rdma"]}, "transports"),
        ({"port": "x"}, "port"),
        ({"timeout_s": -1}, "timeout_s"),
        ({"service": "here:8100"}, "service"),
        ({"http": "here"}, "http"),
    ],
)
def test_a_wrong_setting_is_named(extra: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Settings.read(extra)


def test_each_rank_serves_its_figures_at_a_port_of_its_own() -> None:
    settings = Settings.read({"http": "10.0.0.1:9700"})
    assert [settings.http_of(rank) for rank in (0, 1)] == ["10.0.0.1:9700", "10.0.0.1:9701"]
    assert Settings.read({"http": "10.0.0.1:0"}).http_of(1) == "10.0.0.1:0"
    assert Settings.read({}).http_of(1) == ""


HYBRID = (
    CacheGroup(0, "swa", ("model.layers.0.attn",), BLOCK, 39),  # sliding_window=40
    CacheGroup(2, "full", ("model.layers.1.attn",), 2 * BLOCK),
)


@pytest.fixture
def hybrid(pool: Pool) -> SchedulerSide:
    """Of a model with windows, and a third group, between the two, that is not moved."""
    return make_side(pool, HYBRID)


def test_prefill_hands_over_windows_and_keeps_their_blocks_until_nobody_reads_them(
    hybrid: SchedulerSide, pool: Pool
) -> None:
    hybrid.new_request(prompt := request("a", 88, TO_PREFILL))
    first = step({"a": 64}, new=[("a", ([1, 2, 3, 4], [60], [10, 11]), 0)])
    assert not hybrid.take_orders(first).sends
    assert not pool.held
    last = step({"a": 24}, cached=[("a", ([5, 6], [61], [12]), 64)])
    (send,) = hybrid.take_orders(last).sends
    # The last token's window begins at token 48, the first of block 3.
    assert send.tables == [[0, 0, 0, 4, 5, 6], [10, 11, 12]]
    assert pool.held == {4, 5, 6, 10, 11, 12}
    tables = ([0, 0, 0, 0, 5, 6], [60, 61], [10, 11, 12])  # vLLM let go of block 4
    kept, params = hybrid.request_ended(prompt, tables, completed=True)
    assert kept
    assert params is not None
    assert params["remote_block_ids"] == tables
    assert pool.held == {4, 5, 6, 10, 11, 12}
    hybrid.transfers_ended(["a"], [])
    assert not pool.held


@pytest.mark.parametrize("end", ["preempted", "aborted", "aborted before"])
def test_kept_blocks_are_let_go_however_a_prompt_ends(
    hybrid: SchedulerSide, pool: Pool, end: str
) -> None:
    hybrid.new_request(prompt := request("a", 20, TO_PREFILL))
    scheduled = {"a": 16 if end == "aborted before" else 20}
    hybrid.take_orders(step(scheduled, new=[("a", ([1, 2], [60], [10]), 0)]))
    held = set() if end == "aborted before" else {1, 2, 10}
    assert pool.held == held
    if end == "preempted":
        hybrid.take_orders(step(preempted=["a"]))
        again = step({"a": 20}, cached=[("a", ([7, 8], [60], [11]), 0)], resumed=["a"])
        assert not hybrid.take_orders(again).sends, "it is handed over from where it was"
        assert pool.held == held
    kept, _ = hybrid.request_ended(prompt, ([1, 2], [60], [10]), completed=False)
    assert kept == (end != "aborted before")
    hybrid.transfers_ended(["a"] if kept else [], [])
    assert not pool.held


def test_blocks_are_not_handed_over_without_a_pool_to_keep_them() -> None:
    side = SchedulerSide("me", Settings(), groups=HYBRID, tp_size=1)
    side.new_request(request("a", 20, TO_PREFILL))
    with pytest.raises(RuntimeError, match="did not call bind_gpu_block_pool"):
        side.take_orders(step({"a": 20}, new=[("a", ([1, 2], [60], [10]), 0)]))


def test_decode_leaves_the_last_token_of_a_window_to_vllm(hybrid: SchedulerSide) -> None:
    asked = request("d", 97, REMOTE)
    assert hybrid.num_remote_tokens(asked, 32) == 64
    tables = ([0, 0, 0, 4, 5, 6, 7], [60, 61], [1, 2, 3, 9])  # with room for tokens to come
    hybrid.blocks_allocated(asked, tables, 64)
    (receive,) = hybrid.take_orders(step()).receives
    assert receive.tables == [[0, 0, 0, 4, 5, 6], [1, 2, 3]]
    assert (receive.num_local_tokens, receive.num_tokens) == (32, 96)


def test_decode_tells_prefill_when_it_needs_nothing_of_any_group(hybrid: SchedulerSide) -> None:
    asked = request("d", 33, REMOTE)
    assert hybrid.num_remote_tokens(asked, 32) == 0
    hybrid.blocks_allocated(asked, ([1, 2, 3], [60], [4, 5]), 0)
    (receive,) = hybrid.take_orders(step()).receives
    assert not receive.awaited
    assert receive.tables == [[], []]
    assert receive.num_local_tokens == receive.num_tokens == 33
