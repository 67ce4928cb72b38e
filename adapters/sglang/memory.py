"""SGLang's buffers as regions: it names them by pointer and length, not as tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ...engine.errors import DeviceError, NotRegistered
from ...engine.memory import iovec
from .messages import Component, Entry

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ...engine.memory.regions import MemoryRegion
    from ...engine.transfer_engine import TransferEngine

KV, AUX = "kv", "aux"
# Their items move whole, index by index. The others' indices mean something else (a row's live part),
# or nobody has tried them here.
STATE_TYPES = ("mamba", "swa", "swa_ring", "dsa", "block_scale", "block_scale_swa", "request_row")


class Held(NamedTuple):
    """This rank's buffers, registered.

    Attributes:
        components: as the peer is told: `kv`, `aux`, then SGLang's state components in order.
        regions: of each component's entries; None for an entry without bytes.
    """

    components: tuple[Component, ...]
    regions: tuple[tuple[MemoryRegion | None, ...], ...]


def register_buffers(engine: TransferEngine, args: Any) -> Held:
    """Register every buffer of SGLang's `KVArgs`. SGLang owns the memory and keeps it.

    Raises:
        NotRegistered: a state type, or a buffer, that this backend does not move.
    """
    components, regions = [], []
    gpu = int(getattr(args, "gpu_id", 0) or 0)
    for kind, pointers, lengths, items, layers in _parts(args):
        if kind not in (KV, AUX, *STATE_TYPES):
            raise NotRegistered(
                f"kvferry does not move SGLang's state of type {kind!r} (it moves "
                f"{', '.join(STATE_TYPES)}): use another --disaggregation-transfer-backend for "
                "this model",
                operation="register",
            )
        entries: list[Entry | None] = []
        held: list[MemoryRegion | None] = []
        for pointer, nbytes, item in zip(pointers, lengths, items, strict=True):
            if not pointer or not item or nbytes < item:
                entries.append(None)
                held.append(None)
                continue
            region = engine.register(memory_at(int(pointer), int(nbytes), gpu))
            entries.append(Entry(region.descriptor, int(item), int(nbytes) // int(item)))
            held.append(region)
        components.append(Component(kind, tuple(entries), tuple(int(layer) for layer in layers)))
        regions.append(tuple(held))
    return Held(tuple(components), tuple(regions))


def memory_at(pointer: int, nbytes: int, gpu: int) -> Any:
    """Return what `TransferEngine.register` takes for memory that is known by its address alone.

    Args:
        gpu: the GPU that it may be on; host memory everywhere else.
    """
    if _on_gpu(pointer, gpu):
        return iovec.gpu_bytes_at(gpu, pointer, nbytes)
    return iovec.bytes_at(pointer, nbytes)


def _on_gpu(pointer: int, gpu: int) -> bool:
    """Return whether the driver knows the address; asked, because SGLang keeps some pools in host
    memory."""
    import torch

    if not torch.cuda.is_available():
        return False
    from ...engine.memory.cuda_driver import driver

    cuda = driver()  # raises where it cannot be asked: nobody takes GPU memory for the host's
    try:
        cuda.allocation(gpu, pointer)
    except DeviceError:
        return False
    return True


def _parts(
    args: Any,
) -> Iterator[tuple[str, Sequence[int], Sequence[int], Sequence[int], Sequence[int]]]:
    """Kind, pointers, bytes, bytes of an item and layers of each component of `KVArgs`."""
    layers = getattr(args, "kv_layer_ids", None) or ()
    yield KV, args.kv_data_ptrs, args.kv_data_lens, args.kv_item_lens, layers
    yield AUX, args.aux_data_ptrs, args.aux_data_lens, args.aux_item_lens, ()
    state_layers = getattr(args, "state_layer_ids", None) or ()
    for number, kind in enumerate(args.state_types):
        yield (
            str(getattr(kind, "value", kind)),
            args.state_data_ptrs[number],
            args.state_data_lens[number],
            args.state_item_lens[number],
            state_layers[number] if number < len(state_layers) else (),
        )
