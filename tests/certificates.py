"""An authority and certificates for tests, made on the spot."""

from __future__ import annotations

import datetime
import ipaddress
import re
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Pair:
    """PEM files of one end."""

    certificate: Path
    key: Path

    def der(self) -> bytes:
        return ssl.PEM_cert_to_DER_cert(self.certificate.read_text())

    def end(self) -> float:
        """When the certificate ends, in Unix time."""
        read = x509.load_pem_x509_certificate(self.certificate.read_bytes())
        return read.not_valid_after_utc.timestamp()


class Authority:
    """Signs for 127.0.0.1. `file` is its own certificate."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder, self._key = folder, ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.file = folder / f"{name}.pem"
        own = self._draft(self._name, self._key.public_key())
        own = own.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        self.file.write_bytes(own.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, address: str = "127.0.0.1", days: float = 1) -> Pair:
        """A new key and its certificate, good for so many days, in the files NAME.crt and NAME.key."""
        key = ec.generate_private_key(ec.SECP256R1())
        draft = self._draft(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key.public_key(), days)
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
        signed = draft.add_extension(names, critical=False).sign(self._key, hashes.SHA256())
        pair = Pair(self._folder / f"{name}.crt", self._folder / f"{name}.key")
        pair.certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        pair.key.write_bytes(key.private_bytes(pem, form, serialization.NoEncryption()))
        return pair

    def client(self, pair: Pair | None = None) -> ssl.SSLContext:
        """What a client connects with that believes this authority, and shows a certificate if it has one."""
        context = ssl.create_default_context(cafile=str(self.file))
        if pair:
            context.load_cert_chain(pair.certificate, pair.key)
        return context

    def _draft(self, subject: x509.Name, key: ec.EllipticCurvePublicKey, days: float = 1) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.timezone.utc)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=3))
            .not_valid_after(now + datetime.timedelta(days=days))
        )


def told_ends(page: str) -> dict[str, float]:
    """When the certificates of a /metrics page end, by what they are shown to; "" where the page does not say that."""
    rows = re.findall(r'^llm\w+_certificate_end_seconds(?:\{to="(\w+)"\})? (\S+)$', page, re.MULTILINE)
    return {to: float(end) for to, end in rows}


def served(port: int, context: ssl.SSLContext) -> bytes:
    """The certificate, as DER, that a port of this machine shows."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
    ):
        shown = secure.getpeercert(binary_form=True)
    assert shown is not None
    return shown
