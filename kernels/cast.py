"""The truth about numbers that change their type, in plain PyTorch."""

from __future__ import annotations

import torch

LIMITS = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}
"""The largest magnitude of the quantised types: what is beyond saturates."""


def cast_reference(x: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`float32(x) * factor`, saturated to what fp8 or int8 can hold, by PyTorch's own cast.

    int8 is rounded to the nearest, ties to even, and takes 0 for NaN.

    Args:
        x: numbers of any type.
        factor: float32, broadcast over `x`.
    """
    real = x.to(torch.float32) * factor
    if dtype in LIMITS:
        real = real.clamp(-LIMITS[dtype], LIMITS[dtype])
    if dtype == torch.int8:
        real = torch.nan_to_num(real, nan=0.0).round()
    return real.to(dtype)
