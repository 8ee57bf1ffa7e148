"""Take the weights from every `server.py` that is started with this folder on `PYTHONPATH`.

Python imports a module of this name at its start. It is for servers that somebody else starts, as a relay does.
"""

import sys

if any(argument.endswith("server.py") for argument in sys.orig_argv):
    from tests.deploy.stub_server import without_weights

    without_weights()
