"""The decoder's operations around its matrix products: plain PyTorch (`plain.py`, the reference), or Triton kernels.

`choice.py` says which of the two a decoder gets. Each kernel has a file, and is a `torch.library` operation, so that
the step can also be walked on a fake device, where nothing runs and everything is counted.
"""
