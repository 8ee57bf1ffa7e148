"""Speak, or stream a file, and hear it go on in the same voice. `python client.py --help`."""

import sys

from streaming.entry import client

if __name__ == "__main__":
    sys.exit(client("client.py"))
