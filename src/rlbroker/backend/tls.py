"""TLS: files are checked before anything connects, and a handshake that fails says what to set.

Three things differ from redis-py's own TLS connection: an authority that was named is the only one that is trusted;
files are read once and again only when they changed, as reading all authorities of a machine for each connection
takes longer than connecting; and a refusal is told from a connection that merely broke. That needs a second look
in two cases: TLS 1.3 tells a client that its certificate is not wanted only after the handshake, when the client
has already sent its first command, whose arrival may wipe out the reason; and a Redis server without TLS does
not answer a handshake at all, but waits.
"""

from __future__ import annotations

import logging
import math
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import redis
from redis.exceptions import InvalidResponse

from rlbroker.backend.deadline import try_seconds
from rlbroker.config import TLS_CA_VARIABLE, TLS_CERTIFICATE_VARIABLE, TLS_KEY_VARIABLE
from rlbroker.errors import InvalidArgument

logger = logging.getLogger("rlbroker")

#: A side that says nothing for so long, where it should, is asked in another way.
QUIET_SECONDS: Final = 1.0

#: What OpenSSL says of a server's certificate: X509_V_ERR_….
_NOT_YET_VALID, _EXPIRED = 9, 10
_UNKNOWN_AUTHORITY = (2, 18, 19, 20, 21)
_OTHER_NAME = (62, 64)

#: What a server says that does not take a client's certificate, in the names that releases of OpenSSL give it.
_WANTS_CERTIFICATE = ("CERTIFICATE_REQUIRED", "HANDSHAKE_FAILURE")
_REFUSALS = {
    "UNKNOWN_CA": "was not signed by an authority that the server trusts (its tls-ca-cert-file)",
    "CERTIFICATE_EXPIRED": "has expired, or the server's clock is wrong",
    "CERTIFICATE_REVOKED": "was revoked",
    "UNSUPPORTED_CERTIFICATE": "is not one for clients (its extendedKeyUsage lacks clientAuth)",
    "CERTIFICATE_UNKNOWN": "is not accepted",
    "BAD_CERTIFICATE": "is not accepted",
    "ACCESS_DENIED": "is not accepted",
    "DECRYPT_ERROR": "does not fit its key",
}
_TOO_OLD = ("UNSUPPORTED_PROTOCOL", "PROTOCOL_VERSION")


class TlsRefused(redis.ConnectionError):
    """There can be no secure connection; says why, as what is said of the server's address."""


@dataclass(frozen=True)
class Setting:
    """A file that was named, and by what: a variable, or a parameter of the URL."""

    name: str
    path: str

    def __str__(self) -> str:
        """Show both."""
        return f"{self.path} ({self.name})"

    def text(self) -> str:
        """Read the file.

        Raises:
            InvalidArgument: it cannot be read, or is not PEM.
        """
        try:
            text = Path(self.path).read_text("ascii", "replace")
        except OSError as error:
            raise InvalidArgument(
                f"{self.name}: cannot read {self.path}: {error.strerror or error}"
            ) from None
        if "-----BEGIN " not in text:
            raise InvalidArgument(
                f"{self.name}: {self.path} is not in PEM form, which has lines like -----BEGIN CERTIFICATE-----"
            )
        return text


class Tls:
    """How to know the server, and how to be known to it."""

    def __init__(
        self,
        authority: Setting | None = None,
        certificate: Setting | None = None,
        key: Setting | None = None,
        *,
        check_certificate: bool = True,
        check_name: bool = True,
    ) -> None:
        """Check and read the files.

        Args:
            authority: certificates of those whose signature is trusted; by default those that the machine trusts.
            certificate: the client's own; it may hold the key too.
            key: its private key.
            check_certificate: whether the server must show that it is the right one.
            check_name: whether its certificate must be for the host that the URL names.

        Raises:
            InvalidArgument: a file cannot be used; says which setting named it.
        """
        self.authority, self.certificate, self.key = authority, certificate, key
        self._check_certificate, self._check_name = check_certificate, check_certificate and check_name
        self._lock = threading.Lock()
        self._read, self._context = self._states(), self._make_context()

    def context(self) -> ssl.SSLContext:
        """Give what connections are made with; certificates that were renewed meanwhile are read again.

        Raises:
            InvalidArgument: a file cannot be used any more.
        """
        with self._lock:
            if (states := self._states()) != self._read:
                self._context = self._make_context()
                self._read = states
            return self._context

    def warn_if_unchecked(self, url: str) -> None:
        """Say in the log that somebody between us and the server could read and change everything."""
        if not self._check_certificate:
            logger.warning("%s: ssl_cert_reqs=none: whoever is on the way there can pose as the server", url)
        elif not self._check_name:
            logger.warning(
                "%s: ssl_check_hostname is off: whoever has a certificate of the same authority can pose as the server",
                url,
            )

    def _states(self) -> list[tuple[int, int, int] | None]:
        return [_state(one.path) for one in (self.authority, self.certificate, self.key) if one]

    def _make_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # which checks certificate and name
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.check_hostname = self._check_name
        context.verify_mode = ssl.CERT_REQUIRED if self._check_certificate else ssl.CERT_NONE
        if self.authority is None:
            context.load_default_certs()
        else:
            self._load_authority(context, self.authority)
        if self.certificate is not None:
            self._load_certificate(context, self.certificate, self.key)
        elif self.key is not None:
            raise InvalidArgument(
                f"{self.key.name} names a key, but there is no certificate: set {_pair(self.key)} as well"
            )
        return context

    def _load_authority(self, context: ssl.SSLContext, authority: Setting) -> None:
        authority.text()
        try:
            context.load_verify_locations(authority.path)
        except ssl.SSLError:
            raise InvalidArgument(f"{authority.name}: {authority.path} holds no certificate") from None

    def _load_certificate(
        self, context: ssl.SSLContext, certificate: Setting, given_key: Setting | None
    ) -> None:
        key = given_key or certificate
        text, key_text = certificate.text(), key.text()
        if "PRIVATE KEY-----" not in key_text:
            if given_key is not None:
                raise InvalidArgument(f"{key.name}: {key.path} holds no private key")
            raise InvalidArgument(
                f"{certificate.name} names a certificate without its key: set {_pair(certificate)} as well"
            )
        if "-----BEGIN CERTIFICATE-----" not in text:
            raise InvalidArgument(f"{certificate.name}: {certificate.path} holds no certificate")
        try:
            context.load_cert_chain(certificate.path, key.path, password=partial(_refuse_passphrase, key))
        except ssl.SSLError as error:
            if "MISMATCH" in (error.reason or ""):
                raise InvalidArgument(
                    f"{key.name}: the key in {key.path} is not that of the certificate in {certificate}"
                ) from None
            raise InvalidArgument(
                f"{certificate.name}: the certificate in {certificate.path} or its key in {key} is damaged: "
                f"{error.reason or error}"
            ) from None


class TlsConnection(redis.Connection):
    """A connection by TLS, or an error that says why there is none."""

    def __init__(self, *, tls: Tls, **settings: Any) -> None:
        """Prepare it; nothing is connected yet."""
        self._tls = tls
        prepare: Callable[..., None] = super().__init__
        prepare(**settings)

    def on_connect_check_health(self, check_health: bool = True) -> None:
        """Log in. It is here that a client with TLS 1.3 hears whether its certificate is accepted."""
        try:
            super().on_connect_check_health(check_health)
        except redis.ConnectionError as error:
            if type(error) is redis.ConnectionError:  # not of its kinds: a wrong password, say
                why = self._explained(_alert_of(error) or self._later_alert())
                if why:
                    raise TlsRefused(why) from error
            raise

    def _connect(self) -> ssl.SSLSocket:
        try:
            context = self._tls.context()
        except InvalidArgument as error:  # it could be used when the client was made
            raise TlsRefused(f"cannot be asked: {error}") from error
        plain = self._connect_plain()
        try:
            sock = context.wrap_socket(plain, server_hostname=self.host, do_handshake_on_connect=False)
        except BaseException:
            plain.close()
            raise
        try:
            self._shake_hands(sock)
        except BaseException as error:
            sock.close()
            why = self._explained(error) if isinstance(error, ssl.SSLError) else ""
            if why:
                raise TlsRefused(why) from error
            raise
        return sock

    def _connect_plain(self) -> socket.socket:
        connect: Callable[[], socket.socket] = super()._connect
        return connect()

    def _shake_hands(self, sock: ssl.SSLSocket) -> None:
        try:
            sock.settimeout(min(QUIET_SECONDS, try_seconds(math.inf) / 2))
            sock.do_handshake()
        except (TimeoutError, ssl.SSLError) as error:
            certain = isinstance(error, ssl.SSLCertVerificationError) or _is_alert(error)
            if not certain and self._is_answered_without_tls():
                raise TlsRefused(
                    "speaks no TLS, and the URL says rediss://: turn TLS on in the server, or write redis:// where the "
                    "network can be trusted"
                ) from error
            if not isinstance(error, TimeoutError):
                raise
            sock.settimeout(self.socket_connect_timeout)
            sock.do_handshake()  # goes on where it stood
        sock.settimeout(self.socket_timeout)

    def _is_answered_without_tls(self) -> bool:
        with suppress(OSError), self._connect_plain() as sock:
            sock.settimeout(min(QUIET_SECONDS, try_seconds(math.inf) / 2))
            sock.sendall(b"PING\r\n")
            return bool(sock.recv(1) in (b"+", b"-"))
        return False

    def _later_alert(self) -> ssl.SSLError | None:
        """Connect once more and send nothing: what the server then says is why it refuses."""
        try:
            with self._connect() as sock:
                sock.settimeout(try_seconds(QUIET_SECONDS))
                sock.recv(1)
        except ssl.SSLError as error:
            return error if _is_alert(error) else None
        except OSError:
            pass
        return None

    def _explained(self, error: ssl.SSLError | None) -> str:
        """Say why there is no connection; nothing if it may just have broken."""
        if error is None:
            return ""
        if isinstance(error, ssl.SSLCertVerificationError):
            return self._explained_certificate(error)
        reason = error.reason or ""
        if any(word in reason for word in _TOO_OLD):
            return "speaks no TLS that is new enough: rlbroker needs 1.2; see the server's tls-protocols"
        if not _is_alert(error):
            return ""
        own = self._tls.certificate
        if any(word in reason for word in _WANTS_CERTIFICATE):
            if own is None:
                return (
                    "wants a client certificate, and none is set: set "
                    f"{TLS_CERTIFICATE_VARIABLE} and {TLS_KEY_VARIABLE} (in a URL: ssl_certfile and ssl_keyfile)"
                )
            return f"refuses the handshake ({reason}), with the client certificate {own}"
        for word, what in _REFUSALS.items():
            if word in reason:
                return f"refuses this client: the client certificate {own or ''} {what}"
        return ""

    def _explained_certificate(self, error: ssl.SSLCertVerificationError) -> str:
        if error.verify_code == _EXPIRED:
            return "has a certificate that has expired: renew it, or correct this machine's clock"
        if error.verify_code == _NOT_YET_VALID:
            return "has a certificate that is not valid yet: this machine's clock, or the server's, is wrong"
        if error.verify_code in _OTHER_NAME:
            return (
                f"has a certificate that is not for {self.host}: put a name that it is for into the URL, or make one "
                "that is for this name too"
            )
        if error.verify_code in _UNKNOWN_AUTHORITY:
            trusted = self._tls.authority
            if trusted is None:
                return (
                    "has a certificate that no authority has signed which this machine trusts: name its authority with "
                    f"{TLS_CA_VARIABLE} (in a URL: ssl_ca_certs)"
                )
            return f"has a certificate that was not signed by the authority in {trusted}: name the one that signed it"
        return f"has a certificate that cannot be trusted: {error.verify_message}"


def refusal_of(error: BaseException) -> str:
    """Give why there can be no secure connection, as what is said of the server's address; empty if that is not it.

    A client that the user made has redis-py's own connections, which do not explain.
    """
    if isinstance(error, TlsRefused):
        return str(error)
    for one in _causes(error):
        if isinstance(one, ssl.SSLCertVerificationError):
            return f"has a certificate that cannot be trusted: {one.verify_message}"
        if _is_alert(one) and any(word in str(one) for word in (*_WANTS_CERTIFICATE, *_REFUSALS, *_TOO_OLD)):
            return f"refuses this client by TLS: {one}"
    return ""


def answers_only_tls(pool: redis.ConnectionPool, error: BaseException) -> bool:
    """Whether a server broke a connection without TLS because it wants TLS.

    Args:
        pool: makes the connections.
        error: what redis-py raised.
    """
    host, port = pool.connection_kwargs.get("host"), pool.connection_kwargs.get("port")
    if not host or issubclass(pool.connection_class, TlsConnection | redis.SSLConnection):
        return False
    if not _broke(error):
        return False
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing will be sent to whoever answers
    limit = try_seconds(QUIET_SECONDS)
    try:
        with socket.create_connection((host, port or 6379), limit) as sock:
            sock.settimeout(limit)
            context.wrap_socket(sock).close()
    except ssl.SSLError as refused:
        return _is_alert(refused)
    except OSError:
        return False
    return True


def _broke(error: BaseException) -> bool:
    """Whether the other side closed the connection, or answered with what is no Redis."""
    if isinstance(error, InvalidResponse):
        return True
    return any(isinstance(one, ConnectionResetError | BrokenPipeError) for one in _causes(error)) or (
        type(error) is redis.ConnectionError and "closed by server" in str(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _alert_of(error: BaseException) -> ssl.SSLError | None:
    return next((one for one in _causes(error) if isinstance(one, ssl.SSLError) and _is_alert(one)), None)


def _is_alert(error: BaseException) -> bool:
    """Whether the other side said what it has against us, rather than just going away."""
    return isinstance(error, ssl.SSLError) and "ALERT" in (error.reason or "")


def _state(path: str) -> tuple[int, int, int] | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _pair(setting: Setting) -> str:
    """Give the setting without which this one is of no use."""
    pairs = {TLS_CERTIFICATE_VARIABLE: TLS_KEY_VARIABLE, "ssl_certfile": "ssl_keyfile"}
    return (pairs | {key: certificate for certificate, key in pairs.items()})[setting.name]


def _refuse_passphrase(key: Setting) -> str:
    raise InvalidArgument(
        f"{key.name}: the key in {key.path} has a passphrase, which nobody could type for every worker: take it off "
        "(openssl pkey -in OLD -out NEW) and let only its owner read the file (chmod 600 NEW)"
    )
