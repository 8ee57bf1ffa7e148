"""A client of the native protocol: a connection that comes back, and the API on top of it."""
