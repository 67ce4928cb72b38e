"""A process that `tests/rdma/test_rdma_deaths.py` kills: it writes and is written to until then.

A file of its own, because it is forked from a process that has it imported, and pytest takes long.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import numpy as np

from kvferry.engine.errors import EngineError
from kvferry.engine.transfer_engine import TransferEngine

PATIENCE_S = 120.0
UNAWAITED = 1 << 30  # an imm that the survivor gives nobody


def victim(pipe: Any, survivor: bytes, target: Any, nbytes: int) -> None:
    """Writes into the survivor's memory, and takes what it writes, until it is killed."""
    with TransferEngine(name="victim", nics=("rxe1",), transports=("verbs",)) as engine:
        inbox = engine.register(np.zeros(nbytes, np.uint8))
        outbox = engine.register(np.full(nbytes, 2, np.uint8))
        link = engine.connect(survivor, transport="verbs", timeout_s=PATIENCE_S)
        pipe.send((engine.engine_id, inbox.descriptor))
        with contextlib.suppress(EngineError):
            while True:
                link.write(outbox, 0, target, 0, nbytes, imm=UNAWAITED).wait(PATIENCE_S)
        os._exit(0)
