"""Quantisation: arrays as fp16, bf16, fp8, int8, int4 or sign codes, and back."""

from fastagg.quantization.cast import dequantize, quantize
from fastagg.quantization.quantized import Quantized

__all__ = ["Quantized", "dequantize", "quantize"]
