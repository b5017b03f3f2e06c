"""The array libraries: NumPy, PyTorch, CuPy, and what speaks DLPack."""
