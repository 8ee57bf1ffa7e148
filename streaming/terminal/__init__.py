"""The terminal client: devices, screen, and the conversation between them."""
