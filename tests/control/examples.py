"""One message of every kind, and its golden bytes: the wire format that other languages rely on."""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING

from kvferry.control.handoff.messages import (
    Accepted,
    Bye,
    Cancel,
    Cancelled,
    Describe,
    Done,
    Failed,
    HandoffId,
    Hello,
    Ready,
    Refused,
    Request,
    Sent,
    Welcome,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvferry.control.handoff.messages import Message


def pack_block_ids(block_ids: Iterable[int]) -> bytes:
    """One table: block ids as little-endian int32.

    Raises:
        OverflowError: an id does not fit.
    """
    ids = array("i", block_ids)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()


SESSION = 7
HANDOFF = HandoffId("req-1", 2, 300)
TABLES = (pack_block_ids([5, 70_000]),)

EXAMPLES: dict[str, Message] = {
    "hello": Hello(SESSION, 1, "decode-0", "decode", 1 << 40),
    "describe": Describe(SESSION, "d1", b"cache", b"engine", b"token"),
    "welcome": Welcome(SESSION),
    "refused": Refused(SESSION, "layout", "axis head"),
    "bye": Bye(SESSION, "closed"),
    "request": Request(SESSION, HANDOFF, "push", 2, 4096, 30.0, 9, 1, TABLES),
    "accepted": Accepted(SESSION, HANDOFF),
    "ready": Ready(SESSION, HANDOFF, 2, TABLES),
    "done": Done(SESSION, HANDOFF, 4096),
    "sent": Sent(SESSION, HANDOFF, 4096),
    "failed": Failed(SESSION, HANDOFF, "prefill", "LinkLost", "gone", True),
    "cancel": Cancel(SESSION, HANDOFF, "decode", "user"),
    "cancelled": Cancelled(SESSION, HANDOFF, "prefill"),
}

GOLDEN: dict[str, str] = {
    "hello": (
        "86a474797065a568656c6c6fa773657373696f6e07a776657273696f6e01a46e616d65a86465636f"
        "64652d30a4726f6c65a66465636f6465aa67656e65726174696f6ecf0000010000000000"
    ),
    "describe": (
        "86a474797065a86465736372696265a773657373696f6e07ad6c61796f75745f646967657374a264"
        "31a56361636865c4056361636865a6656e67696e65c406656e67696e65a5746f6b656ec405746f6b"
        "656e"
    ),
    "welcome": ("82a474797065a777656c636f6d65a773657373696f6e07"),
    "refused": (
        "84a474797065a772656675736564a773657373696f6e07a6726561736f6ea66c61796f7574a66465"
        "7461696ca9617869732068656164"
    ),
    "bye": ("83a474797065a3627965a773657373696f6e07a6726561736f6ea6636c6f736564"),
    "request": (
        "8ca474797065a772657175657374a773657373696f6e07a768616e646f666683aa72657175657374"
        "5f6964a57265712d31a7617474656d707402a673657269616ccd012ca46d6f6465a470757368aa6e"
        "756d5f626c6f636b7302a66e6279746573cd1000a974696d656f75745f73cb403e000000000000a3"
        "696d6d09ab736b69705f626c6f636b7301a67461626c657391c4080500000070110100ab73746172745f746f6b656e00aa73746f705f746f6b656e00"
    ),
    "accepted": (
        "83a474797065a86163636570746564a773657373696f6e07a768616e646f666683aa726571756573"
        "745f6964a57265712d31a7617474656d707402a673657269616ccd012c"
    ),
    "ready": (
        "85a474797065a57265616479a773657373696f6e07a768616e646f666683aa726571756573745f69"
        "64a57265712d31a7617474656d707402a673657269616ccd012caa6e756d5f626c6f636b7302a674"
        "61626c657391c4080500000070110100"
    ),
    "done": (
        "84a474797065a4646f6e65a773657373696f6e07a768616e646f666683aa726571756573745f6964"
        "a57265712d31a7617474656d707402a673657269616ccd012ca66e6279746573cd1000"
    ),
    "sent": (
        "84a474797065a473656e74a773657373696f6e07a768616e646f666683aa726571756573745f6964"
        "a57265712d31a7617474656d707402a673657269616ccd012ca66e6279746573cd1000"
    ),
    "failed": (
        "87a474797065a66661696c6564a773657373696f6e07a768616e646f666683aa726571756573745f"
        "6964a57265712d31a7617474656d707402a673657269616ccd012ca473696465a770726566696c6c"
        "a56572726f72a84c696e6b4c6f7374a6726561736f6ea4676f6e65a9726574727961626c65c3"
    ),
    "cancel": (
        "85a474797065a663616e63656ca773657373696f6e07a768616e646f666683aa726571756573745f"
        "6964a57265712d31a7617474656d707402a673657269616ccd012ca473696465a66465636f6465a6"
        "726561736f6ea475736572"
    ),
    "cancelled": (
        "84a474797065a963616e63656c6c6564a773657373696f6e07a768616e646f666683aa7265717565"
        "73745f6964a57265712d31a7617474656d707402a673657269616ccd012ca473696465a770726566"
        "696c6c"
    ),
}
