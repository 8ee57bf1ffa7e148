"""The models' operations as Triton kernels, for a GPU.

Each kernel has a file, and is a `torch.library` operation, so that the step can also be walked on a fake device, where
nothing runs and everything is counted. `operations.py` puts them together.
"""

NAME = "Triton"
