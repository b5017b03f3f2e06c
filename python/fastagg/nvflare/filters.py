"""DXO filters that make parameters smaller on their way, and restore them."""

from __future__ import annotations

from typing import Any

from nvflare.apis.dxo import DXO, DataKind, MetaKey
from nvflare.apis.dxo_filter import DXOFilter
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from fastagg._native.codes import wire_name
from fastagg.nvflare._wire import ALGORITHM, DESCRIPTIONS, pack, unpack
from fastagg.quantization.cast import dequantize
from fastagg.quantization.quantized import Quantized, check_block
from fastagg.quantization.rounding import random_key

_DATA_KINDS = [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF]


class QuantizeFilter(DXOFilter):
    """Quantises the floating arrays of weights and weight differences, each by `fastagg.quantize`.

    Integers, bools and arrays that the wire would not make smaller pass as they are. The codes travel as plain arrays
    and what describes them in the DXO's meta, so NVFlare serialises them without a decomposer. `FedAvgAggregator`
    decodes them while it adds; elsewhere a `DequantizeFilter` restores them. The arrays that were sent are not changed.
    """

    def __init__(self, wire: Any = "fp16", rounding: str = "nearest", block: int | None = None) -> None:
        """A filter for the task results of clients, or the task data of a server.

        Args:
            wire: "fp32", "bf16", "fp16", "fp8_e4m3", "fp8_e5m2", "int8", "int4" or "sign".
            rounding: "nearest" or "stochastic", with a new seed for every array.
            block: elements that share a scale, as in `fastagg.quantize`.

        Raises:
            ValueError: an unknown wire or rounding, or a wrong block.
        """
        super().__init__(supported_data_kinds=_DATA_KINDS, data_kinds_to_filter=_DATA_KINDS)
        self.wire, self.rounding, self.block = wire_name(wire), rounding, block
        random_key(self.wire, rounding, 0)
        check_block(self.wire, block)

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        """The DXO with codes for arrays.

        Raises:
            ValueError: its parameters have been quantised or otherwise processed before.
        """
        processed = dxo.get_meta_prop(MetaKey.PROCESSED_ALGORITHM)
        if processed is not None:
            raise ValueError(f"expected parameters as they are, got some already processed by {processed!r}")
        packed, descriptions = pack(dxo.data, self.wire, self.rounding, self.block)
        nonfinite = [name for name, description in descriptions.items() if description["nonfinite"]]
        if nonfinite:
            self.log_warning(fl_ctx, f"a NaN or an infinity after {self.wire} quantisation in {', '.join(nonfinite)}")
        meta = {MetaKey.PROCESSED_ALGORITHM: ALGORITHM, DESCRIPTIONS: descriptions}
        return DXO(dxo.data_kind, data=packed, meta=_plain_meta(dxo) | meta)


class DequantizeFilter(DXOFilter):
    """Restores what `QuantizeFilter` made, in the original's dtype; passes everything else as it is."""

    def __init__(self) -> None:
        """A filter for the task data of clients, or the task results of a server."""
        super().__init__(supported_data_kinds=_DATA_KINDS, data_kinds_to_filter=_DATA_KINDS)

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO | None:
        """The DXO with arrays for codes, or None if there are no codes.

        Raises:
            TypeError, ValueError: codes do not fit their description; the message names the leaf.
        """
        descriptions = dxo.get_meta_prop(DESCRIPTIONS)
        if descriptions is None:
            return None
        leaves = unpack(dxo.data, descriptions)
        restored = {name: dequantize(leaf) if isinstance(leaf, Quantized) else leaf for name, leaf in leaves.items()}
        return DXO(dxo.data_kind, data=restored, meta=_plain_meta(dxo))


def _plain_meta(dxo: DXO) -> dict[str, Any]:
    """A DXO's meta without what concerns quantisation, and without the history, which the base class copies."""
    left_out = (MetaKey.PROCESSED_ALGORITHM, DESCRIPTIONS, MetaKey.FILTER_HISTORY)
    return {key: value for key, value in dxo.meta.items() if key not in left_out}
