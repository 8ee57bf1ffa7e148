"""The native protocol (`docs/protocol.md`) at its sockets."""
