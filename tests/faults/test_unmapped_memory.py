"""Memory that was unmapped while it is registered: one transfer fails, by name, and nobody is killed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvferry.engine.errors import RegionGone
from kvferry.engine.staging.thresholds import NEVER_DIRECT, VARIABLE, DirectThresholds

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import Peer

PATIENCE_S = 60.0
POOL_NBYTES = 64 << 10
SIZES = {
    "many": [64] * 100,
    "on no grid": [128] * 20,
    "uneven": [96, 160] * 50,
    "few": [64] * 3,
    "large": [8192] * 4,
}


@pytest.mark.parametrize("gone", ["mine", "theirs"])
@pytest.mark.parametrize("verify", [False, True])
def test_pieces_of_unmapped_memory_are_refused(
    start_peer: Callable[..., Peer],
    transport: str,
    gone: str,
    verify: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of every kind that staging copies in its own way, written and read, whoever has lost it."""
    if transport == "verbs":
        pytest.skip("memory that is not mapped cannot be registered with a NIC")
    everything_staged = DirectThresholds(direct_from_nbytes={transport: NEVER_DIRECT})
    monkeypatch.setenv(VARIABLE, str(everything_staged.save(tmp_path / "paths.json")))
    one, other = start_peer(name="one", verify=verify), start_peer(name="other", verify=verify)
    one.call("connect", other.address.encode(), transport)
    other.call("accept", one.engine_id)
    there = other.engine_id
    lost = (one if gone == "mine" else other).call("unmapped", POOL_NBYTES)
    mine = one.call("pool", POOL_NBYTES, 1)
    theirs = other.call("pool", POOL_NBYTES, 2)
    here, remote = (lost, theirs) if gone == "mine" else (mine, lost)
    for what, sizes in SIZES.items():
        gap = 8 if what == "on no grid" else 0
        offsets = np.cumsum([0, *(size + gap for size in sizes[:-1])])
        nbytes = np.array(sizes)
        for operation, (dst, src) in {"write": (remote, here), "read": (here, remote)}.items():
            if operation == "write":
                ticket = one.call("write", there, src.region_id, offsets, dst, offsets, nbytes)
            else:
                ticket = one.call("read", there, dst.region_id, offsets, src, offsets, nbytes)
            with pytest.raises(RegionGone, match="not mapped any more"):
                one.call("wait", ticket, PATIENCE_S)
    ticket = one.call("write", there, mine.region_id, 0, theirs, 0, POOL_NBYTES)
    assert one.call("wait", ticket) == POOL_NBYTES
    assert (other.contents(theirs) == 1).all()
