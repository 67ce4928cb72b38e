"""Where kernels run in these tests, Triton's interpreter or a GPU; and the caches that they move."""

from __future__ import annotations

import math
import mmap
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch

from kvferry.kernels import copy as copy_module
from kvferry.kernels import pieces as pieces_module
from kvferry.kernels import relayout as relayout_module
from kvferry.kernels import rows as rows_module
from kvferry.kernels import scaling as scaling_module
from kvferry.kernels.paged import WIDEST_NBYTES, Geometry, PagedCache

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_SENTINEL = 0x5A
_MAP_NORESERVE = 0x4000


class Case(NamedTuple):
    """Tensors that hold a cache, and how they name it."""

    name: str
    dims: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    num_tensors: int = 3
    crop: tuple[slice, ...] = ()
    order: tuple[str, str] = ("token", "head")

    @property
    def num_blocks(self) -> int:
        where = self.dims.split().index("block")
        span = self.crop[where] if where < len(self.crop) else slice(None)
        return len(range(*span.indices(self.shape[where])))


_HEADS = slice(1, 3)
_ALL = slice(None)
CASES = [
    Case("nhd", "plane block token head dim", (2, 9, 4, 3, 8)),
    Case("hnd", "plane block head token dim", (2, 9, 3, 4, 8)),
    Case("hnd-head-first", "plane block head token dim", (2, 9, 3, 4, 8), order=("head", "token")),
    Case("blocks-first", "block plane token head dim", (9, 2, 4, 3, 8)),
    Case("stacked", "layer plane block token head dim", (3, 2, 9, 4, 3, 8), num_tensors=0),
    Case("layers-inside", "block layer plane token head dim", (9, 3, 2, 4, 3, 8), num_tensors=0),
    Case("latent", "block token dim", (9, 5, 72)),
    Case("state", "block dim", (9, 100), torch.float32),
    Case("one-token", "plane block token head dim", (2, 9, 1, 1, 63)),
    Case("odd-bytes", "plane block token head dim", (2, 9, 3, 5, 7), torch.uint8),
    Case("odd-dim", "plane block token head dim", (2, 9, 5, 2, 63)),
    Case("long-piece", "plane block token dim", (1, 5, 63, 100), torch.float32, num_tensors=1),
    Case(
        "head-slice", "plane block token head dim", (2, 9, 4, 6, 8), crop=(_ALL, _ALL, _ALL, _HEADS)
    ),
    Case(
        "dim-slice",
        "plane block token head dim",
        (2, 9, 4, 3, 16),
        crop=(_ALL, _ALL, _ALL, _ALL, slice(3, 12)),
    ),
    Case(
        "strided-everywhere",
        "plane block token head dim",
        (2, 18, 8, 6, 16),
        crop=(_ALL, slice(1, 18, 2), slice(0, 8, 2), slice(0, 6, 3), slice(0, 8)),
    ),
    Case("fp8", "plane block token head dim", (2, 9, 4, 3, 16), torch.float8_e4m3fn, num_tensors=2),
]


def entries_of(
    tensors: torch.Tensor | Sequence[torch.Tensor],
    dims: str,
    order: tuple[str, str] = ("token", "head"),
) -> list[torch.Tensor]:
    """The planes of all layers, each `[block, outer, inner, dim]` with its own strides."""
    names = tuple(dims.split())
    layers = tensors
    if isinstance(tensors, torch.Tensor):
        where = names.index("layer")
        layers = tensors.unbind(where)
        names = names[:where] + names[where + 1 :]
    # Absent axes are added in front, then all are put in order.
    absent = [name for name in ("plane", *order) if name not in names]
    have = (*reversed(absent), *names)
    axes = [have.index(name) for name in ("plane", "block", *order, "dim")]
    entries: list[torch.Tensor] = []
    for layer in layers:
        entries += layer[(None,) * len(absent)].permute(axes).unbind(0)
    return entries


def cache_of(entries: Sequence[torch.Tensor]) -> PagedCache:
    """What the kernels know of these entries."""
    nbytes = entries[0].element_size()
    num_blocks, outer, inner, dim = entries[0].shape
    block, outer_step, inner_step, step = (stride * nbytes for stride in entries[0].stride())
    assert step == nbytes
    assert all(entry.stride() == entries[0].stride() for entry in entries)
    addresses = [entry.data_ptr() for entry in entries]
    alignment = math.gcd(WIDEST_NBYTES, *addresses)
    geometry = Geometry(
        num_blocks, outer, inner, dim * nbytes, block, outer_step, inner_step, alignment
    )
    return PagedCache.from_addresses(addresses, geometry, entries[0].device)


class Pool:
    """A cache in tensors of its own, every byte of which can be compared."""

    def __init__(self, case: Case, device: str, *, seed: int | None) -> None:
        """Random bytes if there is a seed, else the sentinel."""
        self.case = case
        generator = torch.Generator().manual_seed(seed or 0)
        element_nbytes = case.dtype.itemsize
        nbytes = element_nbytes
        for size in case.shape:
            nbytes *= size
        self.owners = []
        for _ in range(case.num_tensors or 1):
            if seed is None:
                raw = torch.full((nbytes,), _SENTINEL, dtype=torch.uint8)
            else:
                raw = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)
            self.owners.append(raw.to(device))
        self._describe()

    def _describe(self) -> None:
        case = self.case
        tensors = [
            raw.view(case.dtype).view(case.shape)[case.crop]
            if case.crop
            else raw.view(case.dtype).view(case.shape)
            for raw in self.owners
        ]
        self.entries = entries_of(
            tensors if case.num_tensors else tensors[0], case.dims, case.order
        )
        self.cache = cache_of(self.entries)

    def clone(self) -> Pool:
        """A pool of the same bytes elsewhere."""
        other = object.__new__(Pool)
        other.case = self.case
        other.owners = [raw.clone() for raw in self.owners]
        other._describe()
        return other

    def equals(self, other: Pool) -> bool:
        """Every byte, those in no block included."""
        return all(map(torch.equal, self.owners, other.owners))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as bytes: NaNs and fp8 compare by their bits."""
    return tensor.contiguous().view(torch.uint8)


def padded_staging(
    pool: Pool, num_ids: int, *, offset_nbytes: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Staging with sentinel bytes on both sides. Returns all bytes, and the staging in them."""
    nbytes = pool.cache.nbytes(num_ids)
    first = pool.entries[0]
    raw = torch.full(
        (nbytes + 2 * offset_nbytes,), _SENTINEL, dtype=torch.uint8, device=first.device
    )
    inner = raw[offset_nbytes : offset_nbytes + nbytes].view(first.dtype)
    return raw, inner.view(len(pool.entries), num_ids, *first.shape[1:])


def sentinels_intact(raw: torch.Tensor, *, offset_nbytes: int = 64) -> bool:
    """Whether the bytes around the staging still are what they were."""
    around = torch.cat([raw[:offset_nbytes], raw[raw.numel() - offset_nbytes :]])
    return bool((around == _SENTINEL).all())


def interpret_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends CPU tensors through Triton's interpreter, for this test alone.

    TRITON_INTERPRET=1 acts on kernels that are defined after it is set; ours are already there, so
    each is wrapped as that would have done.
    """
    interpreter = pytest.importorskip(
        "triton.runtime.interpreter", reason="Triton exists for Linux alone"
    )
    jit = pytest.importorskip("triton.runtime.jit")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for module in (copy_module, pieces_module, relayout_module, rows_module, scaling_module):
        for name, value in list(vars(module).items()):
            if isinstance(value, jit.JITFunction):
                monkeypatch.setattr(module, name, interpreter.InterpretedFunction(value.fn))


def need_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; torch sees none")


# Without a GPU the tests that need one alone are skipped, and these are not there at all.
_GPU = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []


@pytest.fixture(params=["interpreter", *_GPU])
def kernel_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device of the tensors, for both ways in which kernels run."""
    if request.param == "cuda":
        return "cuda"
    interpret_kernels(monkeypatch)
    return "cpu"


@pytest.fixture
def sparse_bytes() -> Callable[[int], torch.Tensor]:
    """Makes a tensor of so many bytes that takes memory only where it is touched."""

    def make(nbytes: int) -> torch.Tensor:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        return torch.frombuffer(mmap.mmap(-1, nbytes, flags=flags), dtype=torch.uint8)

    return make


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    value: Case = request.param
    return value
