"""What the wrappers of the kernels raise. They know tensors alone: a caller adds request and peer.

KernelError
├── ShapeError        (ValueError)   a dimension, stride, dtype or device that does not fit, by name
├── BlockIdError      (IndexError)   a block id outside the cache, with its position
└── LaunchError       (RuntimeError) the driver refused a launch, with its code
"""

from __future__ import annotations


class KernelError(Exception):
    """The root of this tree."""


class ShapeError(KernelError, ValueError):
    """A tensor does not fit the cache; the message names the dimension."""


class BlockIdError(KernelError, IndexError):
    """A block id lies outside the cache.

    Attributes:
        position: where in the list of ids.
        block_id: the id found there.
    """

    def __init__(self, message: str, *, position: int, block_id: int) -> None:
        super().__init__(message)
        self.position = position
        self.block_id = block_id


class LaunchError(KernelError, RuntimeError):
    """The driver refused a launch.

    Attributes:
        code: CUDA's number for the reason.
    """

    def __init__(self, message: str, *, code: int) -> None:
        super().__init__(message)
        self.code = code
