"""Checkpoint files: opened as mappings from names to arrays, and averaged without loading them."""

from fastagg.files.averaging import Averaged, average, open_checkpoint
from fastagg.files.checkpoints import Checkpoint

__all__ = ["Averaged", "Checkpoint", "average", "open_checkpoint"]
