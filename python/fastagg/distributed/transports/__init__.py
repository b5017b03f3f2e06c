"""One file a way to reduce tensors over a group."""
