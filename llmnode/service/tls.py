"""TLS contexts from PEM files, for a server and for a client, and how a running server takes new files.

Owns what is asked of every connection: TLS 1.2 or newer, and names and chains that are checked. Refuses to know who
listens, who calls, and where the files come from. Errors name the file, never what is in it.
"""

from __future__ import annotations

import contextlib
import ssl
from dataclasses import dataclass
from pathlib import Path

from llmnode.service.settings import SettingError, show

_NAMES = {
    ssl.PROTOCOL_TLS_SERVER: ("tls_cert_file", "tls_key_file", "tls_client_ca_file"),
    ssl.PROTOCOL_TLS_CLIENT: ("node_cert_file", "node_key_file", "node_ca_file"),
}
"""The settings that name the files of each end, for errors."""
_NO_CHECK_TIME = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, for which the ssl module has no name."""


@dataclass(frozen=True)
class Files:
    """The files of one end. certificate: PEM, with the chain that leads to an authority that the other end knows, if
    that takes one. key: its private key. authority: PEM, the certificates that the other end's must come from."""

    certificate: Path | None = None
    key: Path | None = None
    authority: Path | None = None


def server(files: Files) -> ssl.SSLContext | None:
    """What a server listens with; None without a certificate, which is plain HTTP.

    With an authority every client must show a certificate of it. Raises SettingError.
    """
    if files == Files():
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if files.authority is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    renew(context, files)
    return context


def renew(context: ssl.SSLContext, files: Files) -> None:
    """Read the files of a server or a client again, for connections from now on. Raises SettingError, and has then
    changed nothing.

    An authority that is no longer in its file is believed until the process ends: OpenSSL can only add one.
    """
    certificate, key, authority = _NAMES[context.protocol]
    # Into contexts that are thrown away first, since a pair that does not fit would spoil the one in use.
    for draft in (ssl.SSLContext(context.protocol), context):
        if files.certificate is not None or files.key is not None or context.protocol is ssl.PROTOCOL_TLS_SERVER:
            _own(draft, files, certificate, key)
        if files.authority is not None:
            _believe(draft, files.authority, authority)


class Watch:
    """Notices that files have changed: written again, moved into place, or behind a link that points elsewhere now.

    A change counts once it has stayed for two looks in a row, as a certificate and its key are rarely changed at the
    same moment.
    """

    def __init__(self, files: Files) -> None:
        """Make it before the files are read."""
        self._files = files
        self._taken = self._seen = self._stamp()

    def changed(self) -> bool:
        """Whether the files are to be read again. Once for each change."""
        now = self._stamp()
        settled = now == self._seen != self._taken
        self._seen = now
        if settled:
            self._taken = now
        return settled

    def _stamp(self) -> tuple[object, ...]:
        return tuple(map(_stamp, (self._files.certificate, self._files.key, self._files.authority)))


def end(context: ssl.SSLContext | None) -> float | None:
    """When the certificate that a server's context shows ends or has ended, in Unix time (its notAfter).

    None without a context, and for a certificate that no client would take, e.g. one that is for clients only. The
    context itself is asked, so this is what is served, whatever has become of the file. That takes two handshakes in
    memory: the ssl module tells fields of a certificate only to who believes in it, and the first one fetches it.
    """
    if context is None:
        return None
    stranger, believer = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for guest in (stranger, believer):
        guest.check_hostname = False
        # There a client sees the certificate before it is asked for its own.
        guest.minimum_version = ssl.TLSVersion.TLSv1_3
    stranger.verify_mode = ssl.CERT_NONE
    believer.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME
    try:
        believer.load_verify_locations(cadata=_greeted(context, stranger).getpeercert(binary_form=True))
        told = _greeted(context, believer).getpeercert()
    except (ssl.SSLError, ValueError):
        return None
    assert told is not None, "the handshake has verified it"
    return float(ssl.cert_time_to_seconds(str(told["notAfter"])))


def client(files: Files) -> ssl.SSLContext | None:
    """What a client connects with; None when it has nothing of its own to show or to believe, which is the system's
    authorities and no certificate. Raises SettingError."""
    if files == Files():
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if files.authority is None:
        context.load_default_certs()
    renew(context, files)
    return context


def _stamp(path: Path | None) -> tuple[int, int, int, int] | None:
    """Changes when a file's contents do; None while it is missing."""
    try:
        stat = path.stat() if path else None
    except OSError:
        return None
    return (stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_dev) if stat else None


def _greeted(context: ssl.SSLContext, guest: ssl.SSLContext) -> ssl.SSLObject:
    """The end of a client with the context `guest`, connected to a server with `context` within memory."""
    asked, answered = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = guest.wrap_bio(answered, asked)
    far = context.wrap_bio(asked, answered, server_side=True)
    for side in (near, far, near):
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    return near


def _own(context: ssl.SSLContext, files: Files, certificate: str, key: str) -> None:
    """Load the end's own certificate. The names are those of the settings, for errors."""
    if files.certificate is None or files.key is None:
        raise SettingError(
            f"{certificate} and {key} must be set together, got {show(files.certificate)} and {show(files.key)}"
        )
    for path, name in ((files.certificate, certificate), (files.key, key)):
        _readable(path, name)
    try:
        context.load_cert_chain(files.certificate, files.key, password=_refuse_password)
    except (ssl.SSLError, OSError, ValueError) as error:
        raise SettingError(
            f"{certificate} {files.certificate} and {key} {files.key} cannot be used together: {_why(error)}"
        ) from error


def _believe(context: ssl.SSLContext, path: Path, name: str) -> None:
    _readable(path, name)
    try:
        context.load_verify_locations(path)
    except (ssl.SSLError, OSError) as error:
        raise SettingError(f"{name} {path} holds no certificate: {_why(error)}") from error


def _readable(path: Path, name: str) -> None:
    """OpenSSL does not say which file it could not open."""
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise SettingError(f"cannot read {name} {path}: {error.strerror}") from error


def _refuse_password() -> str:
    """OpenSSL would ask at the terminal, and a service has none."""
    raise ValueError("the key has a passphrase, and nobody is there to give it")


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason).lower().replace("_", " ") if reason else str(error)
