"""The operations of both models on a CPU in C (`kernels.c`), compiled for the processor at hand.

Where there is no compiler PyTorch's own do the same, slower, and weights cannot be kept as integers.
"""
