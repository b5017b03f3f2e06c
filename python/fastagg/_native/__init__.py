"""The only door to the native code: element types, operands, and the backends of the devices."""

from fastagg import _core as core

__all__ = ["core"]
