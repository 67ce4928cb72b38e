"""The scheduler side of the vLLM connector: follows requests, and orders the workers what to do.

It does no I/O. What it learns from vLLM's scheduler it turns into one `Orders` a step.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import params as vllm_params
from .cache import NULL_BLOCK
from .orders import Orders, ReceiveOrder, SendOrder
from .params import Asked
from .steps import Holds, PromptQueue, StepLoads

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Sequence

    from .cache import CacheGroup
    from .params import Params, Remote
    from .settings import Settings

# Requests are vLLM's `Request`, outputs its `SchedulerOutput`; both are read by attribute alone.
Request = Any
SchedulerOutput = Any
BlockTables = tuple[list[int], ...]  # one for each of vLLM's groups

# What vLLM calls the answers of a request that wants several; each has the request's parameters.
_SIBLING = re.compile(r"\d+_")

log = logging.getLogger("kvferry.vllm")


@dataclass
class _Prefilling:
    """A request whose prompt another engine waits for."""

    handoff_id: str
    num_tokens: int
    tables: list[list[int]]
    opened: bool = False


class SchedulerSide:
    """One engine's scheduler side. Not thread-safe: vLLM's scheduler calls it.

    Args:
        engine_id: what decode engines know this one by.
        settings: see there.
        groups: the cache groups that are moved.
        tp_size: of this engine.
        role: `prefill`, `decode` or `both`; what a request asks of the other role is not done.
        token_nbytes: of a token's KV on one rank, if a step may wait for a load; see `StepLoads`.

    Attributes:
        holds: blocks that are kept while they are handed over; takes vLLM's block pool.
        addresses: of this engine's agents, one for each rank.
    """

    def __init__(
        self,
        engine_id: str,
        settings: Settings,
        *,
        groups: Sequence[CacheGroup],
        tp_size: int,
        role: str = "both",
        token_nbytes: int = 0,
    ) -> None:
        self.engine_id = engine_id
        self.holds = Holds()
        self.addresses: list[str] = []
        self._queue = PromptQueue()
        self._in_step = StepLoads(settings.in_step_nbytes, token_nbytes)
        self._settings = settings
        self._groups = tuple(groups)
        self._windowed = any(group.window for group in groups)
        self._tp_size = tp_size
        self._role = role
        self._asked: dict[str, Asked] = {}  # of requests that are not over
        self._remotes: dict[str, Remote] = {}  # of those that are loaded, or were to be
        self._taken: dict[tuple[str, str], str] = {}  # handoffs, and which request loads each
        self._prefilling: dict[str, _Prefilling] = {}
        self._receiving: dict[str, str] = {}  # from which engine
        self._sending: set[str] = set()
        self._orders = Orders()
        self._told = (0, 0)

    # Requests come

    def new_request(self, request: Request) -> None:
        """A request arrived."""
        asked = self._ask(request)
        if self._settings.daemon:
            self._queue.add(request.request_id, request.num_prompt_tokens)
        if asked.do_remote_decode:
            name = asked.handoff_id(request.request_id)
            self._prefilling[request.request_id] = _Prefilling(
                name, request.num_prompt_tokens, self._no_blocks()
            )

    def num_remote_tokens(self, request: Request, num_local_tokens: int) -> int:
        """Return how many tokens beyond those here another engine has."""
        asked = self._ask(request)
        if not asked.do_remote_prefill or self._too_few(asked, request):
            return 0
        # In the step that loads them, something must be left to compute.
        count = self._num_loaded(request) - self.loads_in_step(request)
        return int(max(0, count - num_local_tokens))

    def loads_in_step(self, request: Request) -> bool:
        """Return whether the step that allocates this request's blocks also waits for them."""
        return self._in_step.waits(self._ask(request), request.num_prompt_tokens)

    def blocks_allocated(
        self, request: Request, tables: BlockTables, num_remote_tokens: int
    ) -> None:
        """The request has blocks; orders the load. May be called again, and then does nothing."""
        asked = self._ask(request)
        if not asked.do_remote_prefill:
            return
        remote = self._remotes[request.request_id]
        in_step = self.loads_in_step(request)
        asked.do_remote_prefill = False
        if self._too_few(asked, request):
            log.warning(
                "request %s is computed here: prefill has %s tokens, the prompt %d here",
                request.request_id,
                asked.remote_num_tokens,
                request.num_prompt_tokens,
            )
            self._order_release(request, remote)
        elif num_remote_tokens:
            self._queue.load(request.request_id)
            num_tokens = self._num_loaded(request)
            num_local_tokens = num_tokens - in_step - num_remote_tokens
            self._order_receive(
                request,
                remote,
                self._own(tables),
                num_tokens,
                num_local_tokens,
                in_step=in_step,
            )
            if in_step:
                self._in_step.begin(remote.engine_id, request.num_prompt_tokens)
            else:
                self._receiving[request.request_id] = remote.engine_id
        else:
            self._order_release(request, remote)

    def _ask(self, request: Request) -> Asked:
        """Return what a request asks for, of what this engine can do for it. It has come from
        whoever can send requests: what is wrong is computed here, and nothing is raised."""
        req_id = request.request_id
        known = self._asked.get(req_id)
        if known is not None:
            return known
        asked = vllm_params.read(request.kv_transfer_params)
        wrong = asked if isinstance(asked, str) else self._why_not(asked, req_id)
        if wrong:
            log.warning(
                "request %s is computed here: its kv_transfer_params have %s", req_id, wrong
            )
        if wrong or isinstance(asked, str):
            asked = Asked()
        self._asked[req_id] = asked
        return asked

    def _why_not(self, asked: Asked, req_id: str) -> str:
        if asked.do_remote_decode and self._role == "decode":
            return "'do_remote_decode', and this engine is a kv_consumer"
        if asked.do_remote_decode and _SIBLING.match(req_id):
            return "'do_remote_decode' and n above 1: only one answer's KV can be asked for"
        if not asked.do_remote_prefill:
            return ""
        if self._role == "prefill":
            return "'do_remote_prefill', and this engine is a kv_producer"
        remote = asked.remote(self._settings.peers)
        if isinstance(remote, str):
            return remote
        first = self._taken.setdefault((remote.engine_id, remote.handoff_id), req_id)
        if first != req_id:
            return f"a handoff that request {first} loads: n above 1, or a name given twice"
        self._remotes[req_id] = remote
        return ""

    @staticmethod
    def _too_few(asked: Asked, request: Request) -> bool:
        """Return whether prefill says itself that it has fewer tokens than the prompt."""
        there = asked.remote_num_tokens
        return there is not None and there < request.num_prompt_tokens

    # Steps

    def take_orders(self, output: SchedulerOutput) -> Orders:
        """Return what the workers have to do in this step."""
        if self._prefilling:
            self._follow(output)
        orders, self._orders = self._orders, Orders()
        orders.idle = not output.total_num_scheduled_tokens
        self._in_step.scheduled(output.num_scheduled_tokens)
        if self._settings.daemon:
            self._queue.follow(output)
            self._told = orders.queued_tokens, orders.free_blocks = self._load()
        return orders

    def _load(self) -> tuple[int, int]:
        """Tokens of prompts that are not computed yet, and free blocks."""
        return self._queue.num_tokens, self.holds.num_free_blocks

    def _follow(self, output: SchedulerOutput) -> None:
        """Note the blocks of prompts, and open those that this step completes.

        A prompt that is preempted after that is handed over all the same: its blocks are kept.
        """
        for new in output.scheduled_new_reqs:
            prefilling = self._prefilling.get(new.req_id)
            if prefilling is not None:
                prefilling.tables = self._own(new.block_ids)
                self._open_if_completed(new.req_id, new.num_computed_tokens, output)
        cached = output.scheduled_cached_reqs
        for req_id, tables, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            prefilling = self._prefilling.get(req_id)
            if prefilling is None:
                continue
            if req_id in cached.resumed_req_ids:
                prefilling.tables = self._no_blocks()
            if tables is not None:
                for table, more in zip(prefilling.tables, self._own(tables), strict=True):
                    table += more
            self._open_if_completed(req_id, computed, output)

    def _open_if_completed(self, req_id: str, num_computed: int, output: SchedulerOutput) -> None:
        prefilling = self._prefilling[req_id]
        reached = num_computed + output.num_scheduled_tokens.get(req_id, 0)
        if not prefilling.opened and reached >= prefilling.num_tokens:
            prefilling.opened = True
            tables = self._cut(prefilling.tables, prefilling.num_tokens)
            # Windows move on, and a preempted request lets go of all: until they are handed over
            # nobody else gets them.
            self.holds.hold(
                req_id, [block for table in tables for block in table if block != NULL_BLOCK]
            )
            self._orders.sends.append(
                SendOrder(req_id, prefilling.handoff_id, tables, prefilling.num_tokens)
            )

    def transfers_ended(
        self,
        sent: Iterable[str],
        received: Iterable[str],
        failed: Container[str] = (),
        invalid_blocks: Iterable[int] = (),
    ) -> None:
        """The workers say that nobody touches these requests' blocks any more.

        Args:
            failed: those of `received` that were not loaded.
            invalid_blocks: of loads that the step waited for, and that failed.
        """
        sent = tuple(sent)
        for req_id in sent:
            self.holds.release(req_id)
        self._sending.difference_update(sent)
        for req_id in received:
            engine_id = self._receiving.pop(req_id, None)
            if engine_id is not None:
                self._in_step.load_ended(engine_id, failed=req_id in failed)
        self._in_step.step_ended(invalid_blocks)

    @property
    def has_work(self) -> bool:
        """Whether vLLM must go on stepping, though it may have no request."""
        orders = self._orders
        if self._sending or orders.receives or orders.refused:
            return True
        # An engine that falls idle says so: else it would seem full for as long as it idles.
        return bool(self._settings.daemon) and self._load() != self._told

    # Requests end

    def request_ended(
        self, request: Request, tables: BlockTables, *, completed: bool
    ) -> tuple[bool, Params | None]:
        """Return a request ended. Says whether its blocks are kept, and what the router is to
        learn.

        Args:
            completed: it ended by itself, not by an abort or an error.
        """
        req_id = request.request_id
        asked = self._ask(request)
        del self._asked[req_id]
        remote = self._remotes.pop(req_id, None)
        if remote is not None:
            del self._taken[remote.engine_id, remote.handoff_id]
        self._queue.end(req_id)
        self._in_step.request_ended(req_id)
        if asked.do_remote_prefill and remote is not None:  # it was never scheduled
            self._order_release(request, remote)
            return False, None
        if req_id in self._receiving:  # vLLM keeps the blocks until `transfers_ended`
            self._orders.cancelled_receives.append(req_id)
            return False, None
        prefilling = self._prefilling.pop(req_id, None)
        if prefilling is None:
            return False, None
        if not prefilling.opened:
            if asked.transfer_id:  # decode may be waiting for it already
                self._orders.refused.append(prefilling.handoff_id)
            return False, None
        self._sending.add(req_id)
        if not completed:
            self._orders.cancelled_sends.append(req_id)
            return True, None
        self._orders.finished_sends.append(req_id)
        return True, vllm_params.describe(
            self.addresses,
            remote_block_ids=tables,
            remote_engine_id=self.engine_id,
            remote_request_id=prefilling.handoff_id,
            remote_num_tokens=prefilling.num_tokens,
            tp_size=self._tp_size,
            transfer_mode=self._settings.mode,
        )

    # Helpers

    def _num_loaded(self, request: Request) -> int:
        """Tokens of a prompt that are here when its load has ended.

        vLLM computes the last token of a loaded prompt once more, after it has let go of what only
        that token's window still reaches. Not loading it leaves its window whole.
        """
        return int(request.num_prompt_tokens) - self._windowed

    def _no_blocks(self) -> list[list[int]]:
        """Return an empty table for each group that is moved."""
        return [[] for _ in self._groups]

    def _own(self, tables: BlockTables) -> list[list[int]]:
        """Copy of the tables of the groups that are moved."""
        return [list(tables[group.table]) for group in self._groups]

    def _cut(self, tables: list[list[int]], num_tokens: int) -> list[list[int]]:
        """Return the blocks of a prompt's tokens that are still needed for its last one."""
        result = []
        for group, table in zip(self._groups, tables, strict=True):
            # What a window left behind may belong to others by now, and vLLM told nothing of it.
            gone = group.needed_from(num_tokens - 1) // group.block_size
            result.append([NULL_BLOCK] * gone + table[gone : group.num_blocks(num_tokens)])
        return result

    def _order_release(self, request: Request, remote: Remote) -> None:
        """Tell prefill that nothing of its blocks is needed."""
        count = request.num_prompt_tokens
        self._order_receive(request, remote, self._no_blocks(), count, count, awaited=False)

    def _order_receive(
        self,
        request: Request,
        remote: Remote,
        tables: list[list[int]],
        num_tokens: int,
        num_local_tokens: int,
        *,
        awaited: bool = True,
        in_step: bool = False,
    ) -> None:
        self._orders.receives.append(
            ReceiveOrder(
                req_id=request.request_id,
                handoff_id=remote.handoff_id,
                peer=remote.engine_id,
                addresses=remote.addresses,
                tables=[
                    table[: group.num_blocks(num_tokens)]
                    for group, table in zip(self._groups, tables, strict=True)
                ],
                num_tokens=num_tokens,
                num_local_tokens=num_local_tokens,
                awaited=awaited,
                in_step=in_step,
            )
        )
