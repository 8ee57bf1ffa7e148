"""The terminal client: devices, screen, and the talk between them."""
