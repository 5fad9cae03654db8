#!/usr/bin/env python3
"""Whether a certificate and a key can serve the gate's door.

    door.py < {"certificate": PEM, "key": PEM}        exit code 2 and a reason on standard error: they cannot

Runs on the controller, before anything reaches a host. Never says what is in the key.
"""

from __future__ import annotations

import datetime
import json
import sys

from cryptography import x509
from cryptography.hazmat.primitives import serialization


def trouble(certificate: str, key: str, now: datetime.datetime) -> str:
    """Why they cannot be used together; empty when they can."""
    try:
        first = x509.load_pem_x509_certificates(certificate.encode())[0]
    except ValueError:
        return "llmgate_tls_certificate holds no certificate in PEM form"
    try:
        private = serialization.load_pem_private_key(key.encode(), password=None)
    except TypeError:
        return "llmgate_tls_key has a passphrase, and nobody is there to give it"
    except ValueError:
        return "llmgate_tls_key holds no private key in PEM form"
    if private.public_key() != first.public_key():
        return "llmgate_tls_key is not the key of llmgate_tls_certificate's first certificate"
    if now >= first.not_valid_after_utc:
        return f"llmgate_tls_certificate has ended on {first.not_valid_after_utc:%Y-%m-%d}"
    return ""


def main() -> int:
    given = json.load(sys.stdin)
    said = trouble(given["certificate"], given["key"], datetime.datetime.now(datetime.timezone.utc))
    if said:
        print(said, file=sys.stderr)
    return 2 if said else 0


if __name__ == "__main__":
    sys.exit(main())
