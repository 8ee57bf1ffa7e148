"""The models' operations as Triton kernels, for a GPU.

Each kernel has a file, and is a `torch.library` operation, so that the step can also be walked on a fake device, where
nothing runs and everything is counted. `operations.py` puts them together.
"""

NAME = "Triton"
KERNELS = ("begin_frame", "attend", "norm", "gate", "matvec", "windows", "extend", "draw")
"""By name: each can be left out, and what it computes is then PyTorch's."""
WITHOUT = "STREAMING_WITHOUT_KERNELS"
"""The environment variable that leaves kernels out: `all`, or names of `KERNELS`, separated by commas. It is the way
out where a kernel compiles, and then says something wrong or takes the device with it.
"""
