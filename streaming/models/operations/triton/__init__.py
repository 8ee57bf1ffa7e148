"""What runs around both models' matrix products: plain PyTorch (`plain.py`, the reference), or Triton kernels. For a
CPU there is `streaming.models.operations.native`.

`choice.py` says which of them a model gets. Each kernel has a file, and is a `torch.library` operation, so that
the step can also be walked on a fake device, where nothing runs and everything is counted.
"""
