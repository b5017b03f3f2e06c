"""Which leaves of a model are buffers: statistics and counters, which no optimiser should move."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from fastagg._codes import FLOATS, code_of_dtype

# What PyTorch's and Keras's normalisation layers keep beside their parameters.
_BUFFER_NAMES = frozenset({"running_mean", "running_var", "num_batches_tracked", "moving_mean", "moving_variance"})


def is_buffer(name: Any, dtype: Any, buffers: Collection[Any] = ()) -> bool:
    """Whether server optimisers take the clients' mean of a leaf as it is.

    Args:
        name: the leaf's key in a mapping; any other leaf is a buffer only by its dtype.
        dtype: an integer or bool leaf is a buffer.
        buffers: names of further buffers, spelt as in the model.
    """
    if code_of_dtype(dtype) not in FLOATS:
        return True
    if not isinstance(name, str):
        return name in buffers
    return name in buffers or re.split(r"[./]", name)[-1] in _BUFFER_NAMES
