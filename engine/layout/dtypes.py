"""Numbers that change their type on the way: which types, by which factors, and the truth on a CPU.

A stored number times its scale is the real one. So one factor a head, `source scale / destination
scale`, is all that a conversion needs: `cast(clamp(float32(x) * factor))`. The clamp is to what the
quantised types can hold (they saturate); int8 is rounded to the nearest, ties to even. Everything
else is PyTorch's own cast (`kernels/cast.py`).

PyTorch is imported when numbers are converted on a CPU, not before: an agent that moves bits alone
needs none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

PLAIN = ("bfloat16", "float16", "float32")
QUANTISED = ("float8_e4m3fn", "float8_e5m2", "int8")


class ElementType(NamedTuple):
    """What rows are made of at one end: a type's name, and the bytes of one number."""

    dtype: str
    nbytes: int


def has_conversion(src_dtype: str, dst_dtype: str) -> bool:
    """Return whether numbers of one type can become numbers of the other; equal ones move as they
    are."""
    known = {*PLAIN, *QUANTISED}
    return src_dtype == dst_dtype or (src_dtype in known and dst_dtype in known)


def factors(src_scales: Sequence[float], dst_scales: Sequence[float]) -> npt.NDArray[np.float32]:
    """Return one factor, or one a head: what a stored number is multiplied by."""
    left, right = np.asarray(src_scales, np.float32), np.asarray(dst_scales, np.float32)
    return np.asarray(left / right, np.float32)


def convert_bytes(
    data: npt.NDArray[np.uint8],
    factor: npt.NDArray[np.float32],
    src_dtype: str,
    dst_dtype: str,
) -> npt.NDArray[np.uint8]:
    """Rows of bytes of one type as rows of bytes of another.

    Args:
        data: `[row, bytes]`, contiguous.
        factor: `[row]`.
    """
    import torch

    from ...kernels.cast import cast_reference

    there: Any = getattr(torch, dst_dtype)
    x = torch.from_numpy(data).view(getattr(torch, src_dtype))
    out = cast_reference(x, torch.from_numpy(factor)[:, None], there)
    converted: npt.NDArray[np.uint8] = out.view(torch.uint8).numpy()
    return converted


def real_maxima(
    data: npt.NDArray[np.uint8], factor: npt.NDArray[np.float32], src_dtype: str
) -> npt.NDArray[np.float32]:
    """Return the largest magnitude of the real numbers in each row; NaN does not count."""
    import torch

    x = torch.from_numpy(np.ascontiguousarray(data)).view(getattr(torch, src_dtype))
    real = (x.to(torch.float32) * torch.from_numpy(factor)[:, None]).abs()
    largest: npt.NDArray[np.float32] = torch.nan_to_num(real, nan=0.0).amax(dim=1).numpy()
    return largest


def scales_for(largest: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.float32]:
    """Return the scales with which these magnitudes become the largest that a type can hold."""
    import torch

    from ...kernels.cast import LIMITS

    limit = np.float32(1.0 / LIMITS[getattr(torch, dtype)])
    finite = np.isfinite(largest) & (largest * limit > 0)
    scales: npt.NDArray[np.float32] = np.where(finite, largest * limit, 1.0).astype(np.float32)
    return scales
