"""The door: where the server listens, and who may come in by origin, limit, token and handshake."""
