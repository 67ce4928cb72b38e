"""What the wrappers of the kernels raise. They know tensors alone: a caller adds request and peer.

KernelError
├── ShapeError        (ValueError)   a dimension, stride, dtype or device that does not fit, by name
└── LaunchError       (RuntimeError) the driver refused a launch, with its code
"""

from __future__ import annotations


class KernelError(Exception):
    """The root of this tree."""


class ShapeError(KernelError, ValueError):
    """A tensor does not fit the cache; the message names the dimension."""


class LaunchError(KernelError, RuntimeError):
    """The driver refused a launch.

    Attributes:
        code: CUDA's number for the reason.
    """

    def __init__(self, message: str, *, code: int) -> None:
        super().__init__(message)
        self.code = code
