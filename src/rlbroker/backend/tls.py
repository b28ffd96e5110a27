"""TLS connections, and what a failed one means.

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
import socket
import ssl
from collections.abc import Callable, Sequence
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

#: Alerts of a server that does not accept this client, and OpenSSL's words for a server that speaks old versions only.
_REFUSALS: Final = (
    *(
        "CERTIFICATE_REQUIRED",
        "HANDSHAKE_FAILURE",
        "UNKNOWN_CA",
        "CERTIFICATE_EXPIRED",
        "CERTIFICATE_REVOKED",
    ),
    *("UNSUPPORTED_CERTIFICATE", "CERTIFICATE_UNKNOWN", "BAD_CERTIFICATE", "ACCESS_DENIED", "DECRYPT_ERROR"),
    *("UNSUPPORTED_PROTOCOL", "PROTOCOL_VERSION"),
)


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
        authority, certificate, key = self.authority, self.certificate, self.key
        if authority is None:
            context.load_default_certs()
        else:
            _load((authority,), "it must be a PEM file with certificates", context.load_verify_locations)
        if certificate is not None:
            _load(
                (certificate, key) if key else (certificate,),
                "certificate and key must be in PEM form, belong together, and have no passphrase",
                partial(context.load_cert_chain, password=""),  # without a password OpenSSL asks the terminal
            )
        elif key is not None:
            raise InvalidArgument(
                f"{key} is a key without a certificate: set {TLS_CERTIFICATE_VARIABLE} as well"
            )
        return context


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
            # Subclasses have other causes, such as a wrong password.
            if type(error) is redis.ConnectionError and not tls_refusal(error):
                self._look_for_alert()
            raise

    def _connect(self) -> ssl.SSLSocket:
        try:
            context = self._tls.context()
        except InvalidArgument as error:  # the files were usable when the client was made
            raise TlsRefused(f"cannot be reached: {error}") from error
        plain = self._connect_plain()
        try:
            return context.wrap_socket(plain, server_hostname=self.host)
        except BaseException as error:
            plain.close()
            if isinstance(error, OSError) and not tls_refusal(error) and self._answers_without_tls():
                raise TlsRefused(
                    "does not speak TLS, but the URL says rediss://: turn TLS on in the server, or write redis:// if "
                    "the network can be trusted"
                ) from error
            raise

    def _connect_plain(self) -> socket.socket:
        connect: Callable[[], socket.socket] = super()._connect
        return connect()

    def _answers_without_tls(self) -> bool:
        with suppress(OSError), self._connect_plain() as sock:
            sock.settimeout(try_seconds(QUIET_SECONDS))
            sock.sendall(b"PING\r\n")
            return bool(sock.recv(1) in (b"+", b"-"))
        return False

    def _look_for_alert(self) -> None:
        """Connect again and send nothing, so that the server's reason for refusing arrives; raise it."""
        try:
            with self._connect() as sock:
                sock.settimeout(try_seconds(QUIET_SECONDS))
                sock.recv(1)
        except ssl.SSLError as error:
            if tls_refusal(error):
                raise redis.ConnectionError(str(error)) from error
        except OSError:
            pass


def tls_refusal(error: BaseException) -> str:
    """Return why a secure connection is impossible, as a predicate of the server; empty if the error has another cause.

    A user's client makes redis-py's own connections, whose errors are explained here too.
    """
    for one in _chain(error):
        if isinstance(one, TlsRefused):
            return str(one)
        if isinstance(one, ssl.SSLCertVerificationError):
            return (
                f"has a certificate that cannot be trusted: {one.verify_message.rstrip('.')}; check the authority in "
                f"{TLS_CA_VARIABLE} (in a URL: ssl_ca_certs), the host in the URL, and the clocks"
            )
        reason = one.reason or "" if isinstance(one, ssl.SSLError) else ""
        if any(word in reason for word in _REFUSALS):
            return (
                f"refuses this client by TLS: {reason}; check the certificate in {TLS_CERTIFICATE_VARIABLE} and its "
                f"key in {TLS_KEY_VARIABLE} (in a URL: ssl_certfile and ssl_keyfile)"
            )
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


def _is_alert(error: BaseException) -> bool:
    """Return whether the other side sent a reason before it closed the connection."""
    return isinstance(error, ssl.SSLError) and "ALERT" in (error.reason or "")


def _fingerprint(path: str) -> tuple[int, int, int] | None:
    try:
        found = Path(path).stat()
    except (OSError, ValueError):
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _load(files: Sequence[TlsFile], rule: str, load: Callable[..., object]) -> None:
    """Load files with OpenSSL; raise InvalidArgument, with the rule that the files must follow, if that fails."""
    problem = ""
    try:
        for file in files:
            Path(file.path).open("rb").close()  # OpenSSL does not say which file it cannot read
        load(*(file.path for file in files))
    except (OSError, ValueError) as error:
        problem = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
    if problem:  # outside of the handler: the first error shows the path, which may be a URL
        raise InvalidArgument(f"{' with '.join(map(str, files))} cannot be used: {problem}; {rule}")
