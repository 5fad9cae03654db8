#!/usr/bin/env python3
"""The fleet's internal certificate authority, on the controller: makes it once, and signs what hosts ask for.

    authority.py make FOLDER [--check]             prints "made" or "there"
    authority.py sign FOLDER --days N --renew-days N < request.json > answer.json

Owns FOLDER (mode 0700): ca.key, which never leaves it, and ca.crt. A host keeps its own private key and sends a request
for a certificate; what the certificate says (name, addresses) comes from the inventory, never from the host.

request: {"name", "names": addresses and DNS names, "csr": PEM, "certificate": PEM of the one in use, or ""}
answer: {"changed", "why", "certificate": PEM, "authority": PEM}. The certificate in use comes back as long as it is
good: of this authority, for the host's key and these names, and with more than N days to go.

Runs where Ansible runs: `cryptography` comes with ansible-core. Exit code 2 and one line on standard error: it cannot.
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_DAYS = 3650
_PEM = serialization.Encoding.PEM
_BACKDATED = datetime.timedelta(hours=1)  # for hosts whose clock is behind the controller's


class Refusal(Exception):
    """It cannot be done; the message says why, for the person at the terminal."""


@dataclass(frozen=True)
class Authority:
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def read(cls, folder: Path) -> Authority:
        """Raises Refusal."""
        try:
            key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
            certificate = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
        except OSError as error:
            raise Refusal(f"the authority in {folder} cannot be read: {error.strerror} ({error.filename})") from error
        except (ValueError, TypeError) as error:
            raise Refusal(f"the authority in {folder} cannot be used: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise Refusal(f"the authority in {folder} cannot be used: ca.key is not the key of ca.crt")
        return cls(key, certificate)

    def pem(self) -> str:
        return self.certificate.public_bytes(_PEM).decode()


def make(folder: Path, now: datetime.datetime, *, check: bool) -> bool:
    """Make the authority where there is none; whether it did, or with `check` would."""
    if (folder / "ca.crt").exists():
        Authority.read(folder)
        return False
    if check:
        return True
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "llmrack internal authority")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + datetime.timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    # The certificate last: a folder with one is whole.
    _write(folder / "ca.key", key.private_bytes(_PEM, form, plain), 0o600)
    _write(folder / "ca.crt", certificate.public_bytes(_PEM), 0o644)
    return True


def sign(
    authority: Authority, request: dict[str, Any], now: datetime.datetime, *, days: int, renew_days: int
) -> dict[str, Any]:
    """The answer to a host's request. Raises Refusal."""
    try:
        asked = x509.load_pem_x509_csr(request["csr"].encode())
    except ValueError as error:
        raise Refusal(f"{request['name']} sent no request for a certificate: {error}") from error
    if not asked.is_signature_valid:
        raise Refusal(f"{request['name']} does not have the key that it wants a certificate for")
    why = _why_not(authority, request, asked, now, renew_days)
    if not why:
        # Written as this program writes it: on its way here it may have lost its last newline.
        used = x509.load_pem_x509_certificate(request["certificate"].encode()).public_bytes(_PEM).decode()
        return {"changed": False, "why": "", "certificate": used, "authority": authority.pem()}
    end = min(now + datetime.timedelta(days=days), authority.certificate.not_valid_after_utc)
    if end - now < datetime.timedelta(days=renew_days):
        raise Refusal(f"the authority itself ends on {end:%Y-%m-%d}: docs/operations.md says how to replace it")
    key = asked.public_key()
    issuer = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    signed = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, request["name"][:64])]))
        .issuer_name(authority.certificate.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectAlternativeName([_general(name) for name in request["names"]]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    pem = signed.public_bytes(_PEM).decode()
    return {"changed": True, "why": why, "certificate": pem, "authority": authority.pem()}


def _why_not(
    authority: Authority,
    request: dict[str, Any],
    asked: x509.CertificateSigningRequest,
    now: datetime.datetime,
    renew_days: int,
) -> str:
    """Why the certificate in use will not do; empty when it will."""
    if not request["certificate"].strip():
        return "it has none"
    try:
        used = x509.load_pem_x509_certificate(request["certificate"].encode())
        used.verify_directly_issued_by(authority.certificate)
        names = used.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except InvalidSignature:
        return "its certificate is of another authority"
    except (ValueError, TypeError, x509.ExtensionNotFound):
        return "what it has is no certificate of this authority"
    if used.public_key() != asked.public_key():
        return "its certificate is for another key"
    if set(names) != {_general(name) for name in request["names"]}:
        return "its names or addresses have changed"
    left = used.not_valid_after_utc - now
    if left < datetime.timedelta(days=renew_days):
        return f"it ends on {used.not_valid_after_utc:%Y-%m-%d}"
    return ""


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _write(path: Path, data: bytes, mode: int) -> None:
    """Whole or not at all, and never readable by others meanwhile."""
    draft = path.with_suffix(path.suffix + ".new")
    draft.unlink(missing_ok=True)
    out = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(out, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    maker = commands.add_parser("make")
    maker.add_argument("--check", action="store_true")
    signer = commands.add_parser("sign")
    signer.add_argument("--days", type=int, required=True)
    signer.add_argument("--renew-days", type=int, required=True)
    for command in (maker, signer):
        command.add_argument("folder", type=Path)
    asked = parser.parse_args()
    now = datetime.datetime.now(datetime.timezone.utc)
    try:
        if asked.command == "make":
            print("made" if make(asked.folder, now, check=asked.check) else "there")
        else:
            authority, request = Authority.read(asked.folder), json.load(sys.stdin)
            print(json.dumps(sign(authority, request, now, days=asked.days, renew_days=asked.renew_days)))
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
