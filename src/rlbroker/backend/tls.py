"""TLS connections: checks certificate files before connecting, and explains failed handshakes.

Three things differ from redis-py's own TLS connection:

- A certificate authority that the user names is the only one that is trusted.
- Files are read again only after they have changed. Reading all of a machine's authorities for each connection would
  take longer than connecting.
- A refusal is distinguished from a broken connection. Two cases need a second connection for that. With TLS 1.3 the
  server refuses the client's certificate only after the handshake; the client has then sent its first command, whose
  arrival may discard the reason. And a Redis server without TLS does not answer a handshake, but waits for more.
"""

from __future__ import annotations

import logging
import math
import socket
import ssl
from collections.abc import Callable
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

#: How long to wait for an answer that is due before checking for another cause.
QUIET_SECONDS: Final = 1.0

#: OpenSSL's codes for a server's certificate: X509_V_ERR_….
_NOT_YET_VALID, _EXPIRED = 9, 10
_UNKNOWN_AUTHORITY = (2, 18, 19, 20, 21)
_WRONG_NAME = (62, 64)

#: The alerts of a server that does not accept a client's certificate, by the names in several OpenSSL releases.
_CERTIFICATE_WANTED = ("CERTIFICATE_REQUIRED", "HANDSHAKE_FAILURE")
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
_OLD_PROTOCOL = ("UNSUPPORTED_PROTOCOL", "PROTOCOL_VERSION")


class TlsRefused(redis.ConnectionError):
    """A secure connection is impossible. The text is a predicate of the server: "does not speak TLS"."""


@dataclass(frozen=True)
class TlsFile:
    """A file, and the setting that names it: an environment variable or a parameter of the URL."""

    name: str
    path: str

    def __str__(self) -> str:
        """Return the path and the setting."""
        return f"{self.path} ({self.name})"

    def read(self) -> str:
        """Read the file; raise `InvalidArgument` if that fails or it is not PEM."""
        text, problem = "", ""
        try:
            text = Path(self.path).read_text("ascii", "replace")
        except (OSError, ValueError) as error:
            problem = getattr(error, "strerror", None) or type(error).__name__
        if problem:  # outside of the handler: the first error shows the path, which may be a URL
            raise InvalidArgument(f"{self.name}: cannot read {self.path}: {problem}")
        if "-----BEGIN " not in text:
            raise InvalidArgument(
                f"{self.name}: {self.path} is not in PEM form, which has lines like -----BEGIN CERTIFICATE-----"
            )
        return text


class TlsSettings:
    """How a client verifies the server, and the certificate that it shows."""

    def __init__(
        self,
        authority: TlsFile | None = None,
        certificate: TlsFile | None = None,
        key: TlsFile | None = None,
        *,
        check_certificate: bool = True,
        check_name: bool = True,
    ) -> None:
        """Check and read the files.

        Args:
            authority: certificates of the trusted authorities; by default the machine's.
            certificate: the client's certificate; the file may include its key.
            key: the private key of the client's certificate.
            check_certificate: whether the server's certificate must be valid.
            check_name: whether the server's certificate must be for the host in the URL.

        Raises:
            InvalidArgument: a file cannot be used; the message names its setting.
        """
        self.authority, self.certificate, self.key = authority, certificate, key
        self._check_certificate, self._check_name = check_certificate, check_certificate and check_name
        #: The fingerprints of the files, and the context made from them.
        self._made = self._fingerprints(), self._make_context()

    def context(self) -> ssl.SSLContext:
        """Return the context for new connections; certificates that were renewed are read again.

        Raises:
            InvalidArgument: a file can no longer be used.
        """
        made = self._made
        if (fingerprints := self._fingerprints()) != made[0]:
            made = self._made = fingerprints, self._make_context()
        return made[1]

    def warn_if_unchecked(self, url: str) -> None:
        """Log a warning if an attacker between client and server could read and change everything."""
        if not self._check_certificate:
            logger.warning("%s: ssl_cert_reqs=none: an attacker in the network can pose as the server", url)
        elif not self._check_name:
            logger.warning(
                "%s: ssl_check_hostname is off: anyone with a certificate of the same authority can pose as the server",
                url,
            )

    def _fingerprints(self) -> list[tuple[int, int, int] | None]:
        return [_fingerprint(one.path) for one in (self.authority, self.certificate, self.key) if one]

    def _make_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks certificate and name by default
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
                f"{self.key.name} names a key, but there is no certificate: set {_counterpart(self.key)} as well"
            )
        return context

    def _load_authority(self, context: ssl.SSLContext, authority: TlsFile) -> None:
        authority.read()
        try:
            context.load_verify_locations(authority.path)
        except ssl.SSLError:
            raise InvalidArgument(f"{authority.name}: {authority.path} holds no certificate") from None

    def _load_certificate(
        self, context: ssl.SSLContext, certificate: TlsFile, given_key: TlsFile | None
    ) -> None:
        key = given_key or certificate
        text, key_text = certificate.read(), key.read()
        if "PRIVATE KEY-----" not in key_text:
            if given_key is not None:
                raise InvalidArgument(f"{key.name}: {key.path} holds no private key")
            raise InvalidArgument(
                f"{certificate.name} names a certificate without its key: set {_counterpart(certificate)} as well"
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
    """A TLS connection whose errors explain why it cannot be made."""

    def __init__(self, *, tls: TlsSettings, **settings: Any) -> None:
        """Create a connection; nothing is connected yet."""
        self._tls = tls
        prepare: Callable[..., None] = super().__init__
        prepare(**settings)

    def on_connect_check_health(self, check_health: bool = True) -> None:
        """Log in. With TLS 1.3 this is where a client learns whether its certificate is accepted."""
        try:
            super().on_connect_check_health(check_health)
        except redis.ConnectionError as error:
            if type(error) is redis.ConnectionError:  # subclasses have other causes, such as a wrong password
                why = self._explain(_find_alert(error) or self._fetch_alert())
                if why:
                    raise TlsRefused(why) from error
            raise

    def _connect(self) -> ssl.SSLSocket:
        try:
            context = self._tls.context()
        except InvalidArgument as error:  # the files were usable when the client was made
            raise TlsRefused(f"cannot be reached: {error}") from error
        plain = self._connect_plain()
        try:
            sock = context.wrap_socket(plain, server_hostname=self.host, do_handshake_on_connect=False)
        except BaseException:
            plain.close()
            raise
        try:
            self._handshake(sock)
        except BaseException as error:
            sock.close()
            why = self._explain(error) if isinstance(error, ssl.SSLError) else ""
            if why:
                raise TlsRefused(why) from error
            raise
        return sock

    def _connect_plain(self) -> socket.socket:
        connect: Callable[[], socket.socket] = super()._connect
        return connect()

    def _handshake(self, sock: ssl.SSLSocket) -> None:
        try:
            sock.settimeout(min(QUIET_SECONDS, try_seconds(math.inf) / 2))
            sock.do_handshake()
        except (TimeoutError, ssl.SSLError) as error:
            certain = isinstance(error, ssl.SSLCertVerificationError) or _is_alert(error)
            if not certain and self._answers_without_tls():
                raise TlsRefused(
                    "does not speak TLS, but the URL says rediss://: turn TLS on in the server, or write redis:// if "
                    "the network can be trusted"
                ) from error
            if not isinstance(error, TimeoutError):
                raise
            sock.settimeout(self.socket_connect_timeout)
            sock.do_handshake()  # continues the handshake
        sock.settimeout(self.socket_timeout)

    def _answers_without_tls(self) -> bool:
        with suppress(OSError), self._connect_plain() as sock:
            sock.settimeout(min(QUIET_SECONDS, try_seconds(math.inf) / 2))
            sock.sendall(b"PING\r\n")
            return bool(sock.recv(1) in (b"+", b"-"))
        return False

    def _fetch_alert(self) -> ssl.SSLError | None:
        """Connect again and send nothing, so that the server's reason for refusing arrives."""
        try:
            with self._connect() as sock:
                sock.settimeout(try_seconds(QUIET_SECONDS))
                sock.recv(1)
        except ssl.SSLError as error:
            return error if _is_alert(error) else None
        except OSError:
            pass
        return None

    def _explain(self, error: ssl.SSLError | None) -> str:
        """Return why there is no connection; empty if it may just have broken."""
        if error is None:
            return ""
        if isinstance(error, ssl.SSLCertVerificationError):
            return self._explain_certificate(error)
        reason = error.reason or ""
        if any(word in reason for word in _OLD_PROTOCOL):
            return (
                "speaks only old versions of TLS: rlbroker needs 1.2 or newer; see the server's tls-protocols"
            )
        if not _is_alert(error):
            return ""
        own = self._tls.certificate
        if any(word in reason for word in _CERTIFICATE_WANTED):
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

    def _explain_certificate(self, error: ssl.SSLCertVerificationError) -> str:
        if error.verify_code == _EXPIRED:
            return "has a certificate that has expired: renew it, or correct this machine's clock"
        if error.verify_code == _NOT_YET_VALID:
            return "has a certificate that is not valid yet: this machine's clock, or the server's, is wrong"
        if error.verify_code in _WRONG_NAME:
            return (
                f"has a certificate that is not for {self.host}: put a name in the certificate into the URL, or make a "
                "certificate that is for this name too"
            )
        if error.verify_code in _UNKNOWN_AUTHORITY:
            trusted = self._tls.authority
            if trusted is None:
                return (
                    "has a certificate that was not signed by an authority that this machine trusts: name its "
                    f"authority with {TLS_CA_VARIABLE} (in a URL: ssl_ca_certs)"
                )
            return f"has a certificate that was not signed by the authority in {trusted}: name the one that signed it"
        return f"has a certificate that cannot be trusted: {error.verify_message}"


def tls_refusal(error: BaseException) -> str:
    """Return why a secure connection is impossible, as a predicate of the server; empty if the error has another cause.

    A user's client makes redis-py's own connections, whose errors are explained here.
    """
    if isinstance(error, TlsRefused):
        return str(error)
    for one in _chain(error):
        if isinstance(one, ssl.SSLCertVerificationError):
            return f"has a certificate that cannot be trusted: {one.verify_message}"
        if _is_alert(one) and any(
            word in str(one) for word in (*_CERTIFICATE_WANTED, *_REFUSALS, *_OLD_PROTOCOL)
        ):
            return f"refuses this client by TLS: {one}"
    return ""


def requires_tls(pool: redis.ConnectionPool, error: BaseException) -> bool:
    """Return whether a server broke a connection without TLS because it requires TLS; connect once to find out."""
    host, port = pool.connection_kwargs.get("host"), pool.connection_kwargs.get("port")
    if not host or issubclass(pool.connection_class, TlsConnection | redis.SSLConnection):
        return False
    if not _is_broken(error):
        return False
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is sent over this connection
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


def _is_broken(error: BaseException) -> bool:
    """Return whether the other side closed the connection, or its answer was not Redis's protocol."""
    if isinstance(error, InvalidResponse):
        return True
    return any(isinstance(one, ConnectionResetError | BrokenPipeError) for one in _chain(error)) or (
        type(error) is redis.ConnectionError and "closed by server" in str(error)
    )


def _chain(error: BaseException | None) -> list[BaseException]:
    chain = []
    while error is not None:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _find_alert(error: BaseException) -> ssl.SSLError | None:
    for one in _chain(error):
        if isinstance(one, ssl.SSLError) and _is_alert(one):
            return one
    return None


def _is_alert(error: BaseException) -> bool:
    """Return whether the other side sent a reason before it closed the connection."""
    return isinstance(error, ssl.SSLError) and "ALERT" in (error.reason or "")


def _fingerprint(path: str) -> tuple[int, int, int] | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _counterpart(setting: TlsFile) -> str:
    """Return the setting that must accompany this one: certificate and key belong together."""
    pairs = {TLS_CERTIFICATE_VARIABLE: TLS_KEY_VARIABLE, "ssl_certfile": "ssl_keyfile"}
    return (pairs | {key: certificate for certificate, key in pairs.items()})[setting.name]


def _refuse_passphrase(key: TlsFile) -> str:
    raise InvalidArgument(
        f"{key.name}: the key in {key.path} has a passphrase, which cannot be typed for every worker: remove it "
        "(openssl pkey -in OLD -out NEW) and let only its owner read the file (chmod 600 NEW)"
    )
