"""The native protocol, pure: messages, the books of what was sent and received, Opus. Both ends use it."""
