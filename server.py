"""The server: speech in, its continuation out, over WebSockets. `python server.py --help`."""

import sys

from streaming.entry import server

if __name__ == "__main__":
    sys.exit(server("server.py"))
