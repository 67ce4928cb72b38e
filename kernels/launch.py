"""A copy between two paged caches that is compiled and loaded: a launch is one call of the driver.

Triton's own way in finds out anew with every call what is to be launched: 25 us of the host on an
H200 machine, of which 4.3 are the driver's. What does not change is kept here instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .copy import MOST_GRID_Y, MOST_PROGRAMS, copy_kernel, kernel_constants
from .errors import LaunchError
from .paged import WIDEST_NBYTES, check_pair
from .runtime import triton
from .tiles import SMALL_BELOW_NBYTES, default_tuning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .paged import PagedCache

LOG_ROWS = 1 << 14  # launches whose end a host may be late to see: 160 ms of the shortest ones


class GraphWords(NamedTuple):
    """What a launch that a CUDA graph repeats reads and writes on its own: addresses.

    Attributes:
        order: int64 `[2]` on the device: an imm (0 counts nothing), and how many ids to take.
        gate: int64 `[2]` on the device: 0 while launches may move bytes; launches so far.
        log: int64 `[LOG_ROWS, 2]` in pinned memory: row `n % LOG_ROWS` is written by launch n, with
            `n << 33 | failed << 32 | imm` and `n << 40 | number of ids`.
    """

    order: int
    gate: int
    log: int


class LoadedKernel:
    """One compiled kernel, and the memory in which its arguments are handed to the driver.

    The driver is given the address of pointers that stand there once and for all, to words that a launch
    overwrites. The bindings take such an address as it is; argument tuples they would pack anew with
    each launch. They release the interpreter lock: a launch may wait. (Beside a driver that does
    nothing this takes 0.36 to 0.49 us, a structure and a call by ctypes 0.65.)
    """

    def __init__(self, compiled: Any, block_chunks: int = 1, chunks: int = 1) -> None:
        from cuda.bindings import driver  # late: nothing of CUDA is loaded on machines without it

        self.block_chunks = block_chunks
        self.chunks = chunks
        self._compiled = compiled  # keeps the module loaded
        compiled._init_handles()
        self._launch = driver.cuLaunchKernelEx
        self._function = driver.CUfunction(compiled.function)
        self._config = config = driver.CUlaunchConfig()
        config.gridDimZ = config.blockDimY = config.blockDimZ = 1
        config.blockDimX = 32 * compiled.metadata.num_warps
        config.sharedMemBytes = compiled.metadata.shared
        types = [kind for kind in compiled.src.signature.values() if kind != "constexpr"]
        sizes = _parameter_sizes(driver, self._function)
        if any(size != 8 for size in sizes) or len(sizes) < len(types):
            raise RuntimeError(
                f"this version of Triton ({triton.__version__}) hands over arguments in another "
                "way: please report it"
            )
        # What comes behind our own arguments is Triton's scratch memory, which we have none of.
        self.words = (ctypes.c_int64 * len(sizes))()
        base = ctypes.addressof(self.words)
        self._pointers = (ctypes.c_void_p * len(sizes))(*(base + 8 * i for i in range(len(sizes))))
        self._parameters = ctypes.addressof(self._pointers)

    def launch(self, stream: int, x: int, y: int) -> None:
        """Launch with the arguments that are in `words`; the driver copies them."""
        config = self._config
        config.gridDimX = x
        config.gridDimY = y
        config.hStream = stream
        (code,) = self._launch(config, self._function, self._parameters, 0)
        if code:
            raise LaunchError(f"cuLaunchKernelEx failed: {code.name}", code=int(code))


def _parameter_sizes(driver: Any, function: Any) -> list[int]:
    """Ask the driver for the bytes of each parameter of a kernel."""
    sizes: list[int] = []
    while True:
        code, _offset, size = driver.cuFuncGetParamInfo(function, len(sizes))
        if code:  # there is no such parameter
            return sizes
        sizes.append(size)


@contextlib.contextmanager
def _beside_captures() -> Iterator[None]:
    """Let this thread load a kernel whatever CUDA graphs other threads capture."""
    from cuda.bindings import driver

    _, mode = driver.cuThreadExchangeStreamCaptureMode(
        driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    )
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(mode)


class LoadedCopy:
    """Copies blocks of `src` into blocks of `dst`, both seen by one GPU. One launch at a time, which
    the caller sees to.

    Ids, state and flags are addresses: the caller has checked them, and keeps everything alive until
    the stream has passed.

    Args:
        src: on the launching GPU, ours or a peer's.
        dst: as `src`.
        max_programs: upper bound on the programs that run at a time; none if None.
        num_slots: counters of a receiver; that of an imm is number `imm % num_slots`.

    Attributes:
        id_nbytes: bytes that one id moves.

    Raises:
        ShapeError: the two do not fit; names the dimension.
    """

    def __init__(
        self, src: PagedCache, dst: PagedCache, *, max_programs: int | None, num_slots: int
    ) -> None:
        check_pair(src, dst)
        self.src = src
        self.dst = dst
        self._bases = (src.bases.data_ptr(), dst.bases.data_ptr())
        self._device = src.bases.device
        self._entries = src.num_entries
        self.id_nbytes = src.nbytes(1)
        self._blocks = (src.geometry.num_blocks, dst.geometry.num_blocks)
        if max_programs is None and self._entries > MOST_GRID_Y:
            max_programs = MOST_PROGRAMS
        self._cap = max_programs
        self._num_slots = num_slots
        self._lock = threading.Lock()
        self._graph_launch = threading.Lock()
        self._kernels: dict[tuple[object, ...], LoadedKernel] = {}
        self._last: tuple[Any, ...] = ()  # layers follow each other with the same ids

    def load(
        self, src_dtype: torch.dtype, dst_dtype: torch.dtype, num_ids: int, *, graph: bool = False
    ) -> None:
        """Compile and loads what a launch of so many ids of these dtypes needs."""
        self._kernel(num_ids, src_dtype, dst_dtype, graph)

    def launch(
        self,
        stream: int,
        src_ids: int,
        src_dtype: torch.dtype,
        dst_ids: int,
        dst_dtype: torch.dtype,
        num_ids: int,
        state: int,
        counter: int,
        bad_ids: int,
    ) -> None:
        """Launch on a raw stream; the device's context is current. At least one id.

        Args:
            state: int64 on the device, zero; zero again afterwards. One for each stream.
            counter: to which the last program adds the bytes, if no id was out of range; 0: none.
            bad_ids: int32, on the device or pinned, set to 1 if an id was out of range.
        """
        last = self._last
        if last and last[0] == num_ids and last[1] is src_dtype and last[2] is dst_dtype:
            kernel, x, y = last[3:]
        else:
            kernel, x, y = self._kernel(num_ids, src_dtype, dst_dtype, False)
            self._last = (num_ids, src_dtype, dst_dtype, kernel, x, y)
        words = kernel.words
        words[1] = src_ids
        words[3] = dst_ids
        words[4] = bad_ids
        words[5] = state
        words[6] = counter
        words[7] = num_ids * self.id_nbytes
        words[9] = num_ids
        kernel.launch(stream, x, y)

    def launch_for_graph(
        self,
        stream: int,
        src_ids: int,
        src_dtype: torch.dtype,
        dst_ids: int,
        dst_dtype: torch.dtype,
        most_ids: int,
        *,
        state: int,
        counters: int,
        words: GraphWords,
    ) -> None:
        """As `launch`, with the imm and the number of ids, at most `most_ids`, read on the device.

        Several threads may launch at a time: writes of one plan share its kernels.

        Args:
            counters: address of the array of counters.
            words: their `log_rows` and `num_slots` are constants of the kernel.
        """
        kernel, x, y = self._kernel(most_ids, src_dtype, dst_dtype, True)
        arguments: list[ctypes.c_int64 | int] = [
            src_ids,
            self._bases[1],
            dst_ids,
            state,
            *words,
            counters,
            self.id_nbytes,
        ]
        with self._graph_launch:  # the driver reads them without the interpreter lock
            kernel.words[1:10] = arguments
            kernel.words[11] = most_ids
            kernel.launch(stream, x, y)

    def _kernel(
        self, num_ids: int, src_dtype: torch.dtype, dst_dtype: torch.dtype, graph: bool
    ) -> tuple[LoadedKernel, int, int]:
        """Return the kernel for so many ids, and its grid."""
        small = num_ids * self.id_nbytes < SMALL_BELOW_NBYTES
        key = (small, src_dtype, dst_dtype, graph)
        kernel = self._kernels.get(key)
        if kernel is None:
            kernel = self._compile(key, small, src_dtype, dst_dtype, graph, False)
        tiles = -(-num_ids * kernel.block_chunks // kernel.chunks)
        cap = self._cap
        if cap is None or cap >= tiles * self._entries:
            return kernel, tiles, self._entries
        kernel = self._kernels.get((*key, True))
        if kernel is None:
            kernel = self._compile((*key, True), small, src_dtype, dst_dtype, graph, True)
        return kernel, cap, 1

    def _compile(
        self,
        key: tuple[object, ...],
        small: bool,
        src_dtype: torch.dtype,
        dst_dtype: torch.dtype,
        graph: bool,
        loop: bool,
    ) -> LoadedKernel:
        nbytes = 1 if small else SMALL_BELOW_NBYTES
        tuning = default_tuning(nbytes, staged=False, capped=self._cap is not None)
        cut = kernel_constants(self.src.geometry, self.dst.geometry, WIDEST_NBYTES, tuning)
        constants = (*cut.arguments, loop, self._num_slots, LOG_ROWS)
        # A dtype stands for a pointer to it. Integers are int64 whatever their value.
        word = torch.int64 if graph else None
        arguments = (
            self.src.bases,
            src_dtype,
            self.dst.bases,
            dst_dtype,
            None if graph else torch.int32,
            torch.int64,
            word,
            word,
            word,
            *(2,) * 6,
            *constants,
        )
        with self._lock, torch.cuda.device(self._device), _beside_captures():
            compiled = copy_kernel.warmup(*arguments, grid=(1,), num_warps=tuning.num_warps)
            kernel = LoadedKernel(compiled, cut.block_chunks, cut.chunks)
            # The arguments that are the same with every launch.
            kernel.words[0], kernel.words[2] = self._bases
            at = 10 if graph else 8
            kernel.words[at] = self._entries
            kernel.words[at + 2], kernel.words[at + 3] = self._blocks
            self._kernels[key] = kernel
        return kernel
