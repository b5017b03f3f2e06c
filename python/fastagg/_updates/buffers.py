"""Which leaves of a model are buffers: statistics and counters, which no optimiser should move."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from fastagg._native.codes import FLOATS, code_of_dtype

# What PyTorch's and Keras's normalisation layers keep beside their parameters, as the last part of a name. Keras 2
# writes "moving_mean:0", and "moving_mean_1:0" where a name is there already.
_BUFFER_NAME = re.compile(
    r"(?:.*[./])?(?:running_mean|running_var|num_batches_tracked|moving_mean|moving_variance)(?:_\d+)?(?::\d+)?",
    re.DOTALL,
)


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
    return name in buffers or _BUFFER_NAME.fullmatch(name) is not None
