"""The LM head where the vocabulary is: chunked driver (head.py) and, on a GPU, its Triton kernels."""
