"""Moto's S3 as a process of its own, with one bucket and one user: prints its URL, and the user's two keys."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from typing import Any

import boto3
import requests
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "sessions"
_POLICY = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}


class Quiet(WSGIRequestHandler):
    """Log nothing."""

    def log(self, *_: Any) -> None:
        pass


def main() -> None:
    moto, one_at_a_time = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        with one_at_a_time:  # moto's If-None-Match looks first and writes then, and that of S3 does not
            return list(moto(environ, start_response))

    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    url = f"http://127.0.0.1:{server.server_port}"
    keys = {"region_name": "us-east-1", "aws_access_key_id": "any", "aws_secret_access_key": "any"}
    boto3.client("s3", endpoint_url=url, **keys).create_bucket(Bucket=BUCKET)
    iam = boto3.client("iam", endpoint_url=url, **keys)
    iam.create_user(UserName="server")
    iam.put_user_policy(UserName="server", PolicyName="all", PolicyDocument=json.dumps(_POLICY))
    key = iam.create_access_key(UserName="server")["AccessKey"]
    requests.post(f"{url}/moto-api/reset-auth", data="0", timeout=10)  # from here on keys are checked
    print(url, key["AccessKeyId"], key["SecretAccessKey"], flush=True)
    serving.join()


if __name__ == "__main__":
    main()
