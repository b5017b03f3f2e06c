"""
fastagg's operations on CUDA devices.
"""

from __future__ import annotations

import typing

__all__: list[str] = ["cast", "device_count", "driver_version", "reduce", "runtime_version", "weighted_sum"]

def cast(operands: tuple[typing.Any, ...], stream: typing.SupportsInt | typing.SupportsIndex, check: bool) -> bool:
    """
    Decodes a source and encodes it as another code on a stream; with check, waits and returns whether nothing became infinite or NaN.
    """

def device_count() -> int:
    """
    CUDA devices that can be used; 0 without a driver.
    """

def driver_version() -> int:
    """
    CUDA's version that the driver serves; 0 without a driver.
    """

def reduce(
    operands: tuple[typing.Any, ...], stream: typing.SupportsInt | typing.SupportsIndex, norm: bool, check: bool
) -> tuple[bool, float]:
    """
    Adds up encoded arrays, divides and encodes on a stream; with norm or check, waits and returns whether the result is finite, and its sum of squares.
    """

def runtime_version() -> int:
    """
    CUDA's version that this module was built with.
    """

def weighted_sum(leaves: list[typing.Any], stream: typing.SupportsInt | typing.SupportsIndex, check: bool) -> list[int]:
    """
    Weighted sums or maxima of leaves on a stream; with check, waits and returns the indices of leaves with non-finite sums.
    """
