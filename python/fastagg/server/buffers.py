"""Which leaves server optimisers take from the clients' mean as they are."""

from fastagg._updates.buffers import is_buffer

__all__ = ["is_buffer"]
