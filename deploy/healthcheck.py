"""A container's HEALTHCHECK: it ends with status 0 while the server lives, whose port the environment tells.

Whether it speaks TLS may stand in a file or in flags, which this does not read: so it asks without and then with TLS,
where it has no variable that says so. (A server with TLS hangs up at once on who comes without; the other way round it
would wait.)
"""

from __future__ import annotations

import http.client
import os
import ssl
import sys

_TIMEOUT_S = 2
"""The limit of each of two tries: the image allows 5 s for both."""


def main() -> int:
    port = int(os.environ.get("STREAMING_PORT") or 8765)
    # The certificate is for another name than this, and whoever answers here is in this container.
    unverified = ssl._create_unverified_context()  # noqa: S323
    secure = http.client.HTTPSConnection("127.0.0.1", port, timeout=_TIMEOUT_S, context=unverified)
    plain = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    ways = (secure, plain) if os.environ.get("STREAMING_TLS_CERT") else (plain, secure)
    return 0 if any(map(_lives, ways)) else 1


def _lives(connection: http.client.HTTPConnection) -> bool:
    try:
        connection.request("GET", "/health/live")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
