#!/usr/bin/env python3
"""Whether what listens on a port of this host shows the certificate that a file holds.

    shown.py ADDRESS PORT FILE        prints "same", "other", or "none": nothing listens there, or not with TLS

Runs on hosts, with nothing but Python. It trusts nobody: it only compares.
"""

from __future__ import annotations

import socket
import ssl
import sys
from pathlib import Path


def shown(address: str, port: int) -> bytes | None:
    """The certificate, as DER; None when there is none to see.

    A server that asks for a client's certificate refuses this connection, but after it has shown its own (TLS 1.3).
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with socket.create_connection((address, port), timeout=5) as plain, context.wrap_socket(plain) as secure:
            return secure.getpeercert(binary_form=True)
    except OSError:
        return None


def main() -> None:
    address, port, file = sys.argv[1:]
    seen = shown(address, int(port))
    pem = Path(file).read_text()
    end = "-----END CERTIFICATE-----"
    first = pem[pem.index("-----BEGIN CERTIFICATE-----") : pem.index(end) + len(end)]
    print("none" if seen is None else "same" if seen == ssl.PEM_cert_to_DER_cert(first) else "other")


if __name__ == "__main__":
    main()
