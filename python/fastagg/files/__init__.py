"""Checkpoint files: opened as mappings from names to arrays, and averaged without loading them."""

from fastagg._errors import NotKeptWarning
from fastagg._public import name_publicly
from fastagg.files.averaging import Averaged, average, open_checkpoint
from fastagg.files.checkpoints import Checkpoint

__all__ = ["Averaged", "Checkpoint", "NotKeptWarning", "average", "open_checkpoint"]

name_publicly(globals())
