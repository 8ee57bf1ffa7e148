"""The server: sockets, dialects, who may come in, and what an operator sees."""
