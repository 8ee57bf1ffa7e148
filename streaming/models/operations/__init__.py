"""The models' operations: the interface, the reference in PyTorch, Triton for a GPU, C for a CPU, and the choice."""
