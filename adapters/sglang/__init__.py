"""kvferry as a transfer backend of SGLang: `--disaggregation-transfer-backend kvferry`.

SGLang has no registry of backends. Its plug-ins may replace classes and wrap functions, in every
process that it starts: `register` adds a member to the enumeration of backends, a choice to the
option, and our classes to the function that looks them up. Written against SGLang 0.5.23.
"""

from __future__ import annotations

import importlib
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

NAME = "kvferry"
UTILS = "sglang.srt.disaggregation.utils"
# By SGLang's name of the kind: the file here and the class in it.
CLASSES = {
    "manager": ("manager", "KVFerryKVManager"),
    "sender": ("requests", "KVFerryKVSender"),
    "receiver": ("requests", "KVFerryKVReceiver"),
    "bootstrap_server": ("manager", "KVFerryKVBootstrapServer"),
}


def register() -> None:
    """Make the backend known; SGLang calls it as a plug-in, before it reads its options."""
    from sglang.srt.arg_groups.choices import (
        DISAGG_TRANSFER_BACKEND_CHOICES,
        add_disagg_transfer_backend_choices,
    )
    from sglang.srt.disaggregation.utils import TransferBackend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if NAME not in DISAGG_TRANSFER_BACKEND_CHOICES:
        add_disagg_transfer_backend_choices([NAME])
    if NAME in {member.value for member in TransferBackend}:
        return
    HookRegistry.register(
        f"{UTILS}.TransferBackend", _with_kvferry(TransferBackend), HookType.REPLACE
    )
    HookRegistry.register(f"{UTILS}.get_kv_class", get_kv_class, HookType.AROUND)


def get_kv_class(original: Callable[..., Any], transfer_backend: Any, class_type: Any) -> Any:
    """Look a class up as SGLang does, with ours among them."""
    if transfer_backend.value != NAME or class_type.value not in CLASSES:
        return original(transfer_backend, class_type)
    file, name = CLASSES[class_type.value]
    return getattr(importlib.import_module(f"{__name__}.{file}"), name)


def _with_kvferry(backends: Any) -> Any:
    """SGLang's enumeration with one more member; an enumeration cannot be subclassed."""
    members = [(member.name, member.value) for member in backends]
    return Enum(
        backends.__name__,
        [*members, (NAME.upper(), NAME)],
        module=backends.__module__,
        qualname=backends.__qualname__,
    )
