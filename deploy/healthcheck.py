"""For a container's HEALTHCHECK: status 0 while the server lives, whose port and TLS it knows by the environment."""

from __future__ import annotations

import http.client
import os
import ssl
import sys


def main() -> int:
    port = int(os.environ.get("STREAMING_PORT") or 8765)
    if os.environ.get("STREAMING_TLS_CERT"):
        # The certificate is for another name than this, and whoever answers here is in this container.
        unverified = ssl._create_unverified_context()  # noqa: S323
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            "127.0.0.1", port, timeout=4, context=unverified
        )
    else:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=4)
    try:
        connection.request("GET", "/health/live")
        return 0 if connection.getresponse().status == 200 else 1
    except (OSError, http.client.HTTPException):
        return 1


if __name__ == "__main__":
    sys.exit(main())
