"""Messages and sockets; no tensors."""
