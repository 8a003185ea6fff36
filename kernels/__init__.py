"""The LM head in chunks (head.py) and, on a GPU, its Triton kernels."""
