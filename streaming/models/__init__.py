"""Tensors: the codec, the decoder, the sampler, and how they are loaded. No threads, no sockets."""
