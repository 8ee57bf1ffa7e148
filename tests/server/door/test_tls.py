"""Certificates and keys that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from streaming.server.door.tls import TlsError, load_tls
from tests.server.certificate import self_signed


def test_a_certificate_and_its_key_go_together(tmp_path: Path) -> None:
    """A server with a certificate and no key would have spoken in the clear."""
    certificate, key = map(str, self_signed(tmp_path))
    assert load_tls(None, None) is None
    assert load_tls(certificate, key) is not None
    for one, other in ((certificate, None), (None, key)):
        with pytest.raises(TlsError, match="go together"):
            load_tls(one, other)


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    certificate, key = map(str, self_signed(tmp_path))
    absent = str(tmp_path / "none.pem")
    mistakes = ((certificate, absent, f"cannot read --tls-key {absent}"), (key, certificate, "--tls-cert"))
    for one, other, said in mistakes:
        with pytest.raises(TlsError, match=said):
            load_tls(one, other)
