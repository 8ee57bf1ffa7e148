"""Frames and slots: sessions, turns, and the one thread that runs steps. No tensors, no sockets."""
