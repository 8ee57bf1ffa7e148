"""Who may come in: where the server listens, origins, limits, tokens, handshakes."""
