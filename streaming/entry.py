"""The programs: `server.py` and `client.py`, which are `streaming-server` and `streaming-client` where the package is
installed. Signals are seen to first; everything else is imported after that.
"""

from __future__ import annotations

from streaming.command import end_on_signals, end_output


def server(program: str = "streaming-server") -> int:
    """Run the server with the process's arguments; return its exit status. program: what it calls itself."""
    end_on_signals()
    from streaming.server.command import main

    return end_output(main(program=program), program)


def client(program: str = "streaming-client") -> int:
    """Run the client with the process's arguments; return its exit status. program: what it calls itself."""
    end_on_signals()
    from streaming.terminal.command import main

    return end_output(main(program=program), program)
