"""User, password and TLS files of a client: from the URL, then from the environment; and what is refused."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import Any

import pytest
from certificates import Certificates

from rlbroker.backend.client import client_from_url
from rlbroker.config import TLS_VARIABLES
from rlbroker.errors import InvalidArgument

pytestmark = pytest.mark.unit

CA, CERTIFICATE, KEY = TLS_VARIABLES

PAIR_RULE = "certificate and key must be in PEM form, belong together, and have no passphrase"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RLBROKER_REDIS_USERNAME", "RLBROKER_REDIS_PASSWORD", "RLBROKER_REDIS_PASSWORD_FILE")
    for name in (*names, *TLS_VARIABLES):
        monkeypatch.delenv(name, raising=False)


def settings(url: str) -> dict[str, Any]:
    found: dict[str, Any] = client_from_url(url).connection_pool.connection_kwargs
    return found


def login(url: str) -> tuple[str | None, str | None]:
    found = settings(url)
    return found.get("username"), found.get("password")


def refusal_message(url: str) -> str:
    with pytest.raises(InvalidArgument) as caught:
        client_from_url(url)
    return str(caught.value)


def test_user_and_password_come_from_the_environment_if_the_url_lacks_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert login("redis://host") == (None, None)
    monkeypatch.setenv("RLBROKER_REDIS_USERNAME", "pong-worker-3")
    monkeypatch.setenv("RLBROKER_REDIS_PASSWORD", "p@ss/word")
    assert login("redis://host") == login("unix:///run/redis.sock") == ("pong-worker-3", "p@ss/word")
    assert login("redis://me@host") == ("me", "p@ss/word")
    assert login("redis://:mine@host") == ("pong-worker-3", "mine")
    assert login("redis://host?username=me&password=mine") == ("me", "mine")
    monkeypatch.delenv("RLBROKER_REDIS_PASSWORD")
    file = tmp_path / "password"
    monkeypatch.setenv("RLBROKER_REDIS_PASSWORD_FILE", str(file))
    for text in (" kept ", " kept \n", " kept \r\n"):
        file.write_bytes(text.encode())
        assert login("redis://host") == ("pong-worker-3", " kept ")
    file.unlink()
    assert login("redis://me:mine@host") == ("me", "mine")  # the file is not read


def test_an_unusable_password_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    monkeypatch.setenv("RLBROKER_REDIS_PASSWORD_FILE", str(file))
    assert refusal_message("redis://host") == (
        f"RLBROKER_REDIS_PASSWORD_FILE: cannot read {file}: No such file or directory"
    )
    for text, message in (
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"s3\ncret", "more than one line"),
        (b"\xff", "no"),
    ):
        file.write_bytes(text)
        found = refusal_message("redis://host")
        assert message in found
        assert found.startswith(f"RLBROKER_REDIS_PASSWORD_FILE: {file} ")
        assert "cret" not in found
    monkeypatch.setenv("RLBROKER_REDIS_PASSWORD", "s3cret")
    assert refusal_message("redis://host") == (
        "RLBROKER_REDIS_PASSWORD and RLBROKER_REDIS_PASSWORD_FILE are both set; unset one of them"
    )


def test_an_unknown_or_invalid_parameter_of_the_url_is_refused_by_name() -> None:
    assert "a parameter 'sokcet_timeout' that rlbroker does not know" in refusal_message(
        "redis://host?sokcet_timeout=1"
    )
    assert "it knows db, username," in refusal_message("unix:///run/redis.sock?retry=3")
    assert refusal_message("rediss://host?ssl_ca_certs=").startswith(
        "ssl_ca_certs in the server's URL rediss://host has no"
    )
    assert "socket_timeout in the server's URL redis://host cannot have" in refusal_message(
        "redis://host?socket_timeout=long"
    )
    assert "ssl_cert_reqs in the server's URL must be one of 'required'" in refusal_message(
        "rediss://h?ssl_cert_reqs=no"
    )
    assert settings("redis://host?socket_timeout=2.5")["socket_timeout"] == 2.5


def test_tls_settings_are_refused_with_a_url_without_tls(
    monkeypatch: pytest.MonkeyPatch,
    certificates: Certificates,
) -> None:
    assert refusal_message(f"redis://me:secret@host?ssl_ca_certs={certificates.ca()}") == (
        "ssl_ca_certs in the server's URL redis://host is for TLS; write rediss:// to use TLS"
    )
    monkeypatch.setenv(CA, certificates.ca())
    found = refusal_message("redis://me:secret@host")
    assert found.startswith("RLBROKER_TLS_CA_FILE is set, but the server's URL redis://host is without TLS")
    assert "secret" not in found
    assert settings("unix:///run/redis.sock")  # a Unix socket does not leave the machine


def test_the_server_must_have_a_valid_certificate_and_at_least_tls_1_2(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    certificates: Certificates,
) -> None:
    own, key = certificates.certificate("me", client=True)
    for name, path in ((CA, certificates.ca()), (CERTIFICATE, own), (KEY, key)):
        monkeypatch.setenv(name, path)
    tls = settings("rediss://host")["tls"]
    context = tls.context()
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert len(context.get_ca_certs()) == 1, "the machine's own authorities are not trusted"
    assert (str(tls.certificate), str(tls.key)) == (f"{own} ({CERTIFICATE})", f"{key} ({KEY})")
    assert tls.context() is context, "files are read once"
    assert not caplog.records


def test_the_url_wins_over_the_environment_and_key_and_certificate_have_one_source(
    monkeypatch: pytest.MonkeyPatch,
    certificates: Certificates,
) -> None:
    for name in TLS_VARIABLES:
        monkeypatch.setenv(name, "/nowhere")
    own, key = certificates.certificate("me", client=True)
    ca = f"ssl_ca_certs={certificates.ca()}"
    assert (
        refusal_message(f"rediss://host?{ca}")
        == f"/nowhere ({CERTIFICATE}) with /nowhere ({KEY}) cannot be used: No such file or directory; {PAIR_RULE}"
    )
    tls = settings(f"rediss://host?{ca}&ssl_certfile={own}&ssl_keyfile={key}")["tls"]
    assert (tls.authority.name, tls.certificate.name, tls.key.name) == (
        "ssl_ca_certs",
        "ssl_certfile",
        "ssl_keyfile",
    )
    assert refusal_message(f"rediss://h?{ca}&ssl_certfile={own}").startswith(
        f"{own} (ssl_certfile) cannot be used: "
    )
    both = certificates.folder / "both.pem"
    both.write_text(Path(own).read_text() + Path(key).read_text())
    assert settings(f"rediss://h?{ca}&ssl_certfile={both}")["tls"].key is None


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("ssl_cert_reqs=none", "ssl_cert_reqs=none: an attacker in the network"),
        ("ssl_check_hostname=false", "ssl_check_hostname is off: anyone with a certificate"),
    ],
)
def test_an_unchecked_certificate_is_logged_as_a_warning(
    caplog: pytest.LogCaptureFixture, query: str, message: str
) -> None:
    with caplog.at_level(logging.WARNING, "rlbroker"):
        context = settings(f"rediss://me:secret@host?{query}")["tls"].context()
    assert not context.check_hostname
    (record,) = caplog.records
    assert record.getMessage().startswith(f"rediss://host: {message}")


def test_unusable_files_are_refused_with_the_setting_that_names_them(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    certificates: Certificates,
) -> None:
    own, key = certificates.certificate("me", client=True)
    _, other_key = certificates.certificate("other", client=True)
    noise, damaged, locked = tmp_path / "noise", tmp_path / "damaged", tmp_path / "locked"
    noise.write_bytes(b"\x30\x82\xff")
    damaged.write_text(Path(own).read_text().replace("M", "N"))
    from cryptography.hazmat.primitives import serialization

    loaded = serialization.load_pem_private_key(Path(key).read_bytes(), None)
    locked.write_bytes(
        loaded.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    for variables, reason in (
        ({CA: "/nowhere"}, "No such file or directory"),
        ({CA: str(tmp_path)}, "Is a directory"),
        ({CA: str(noise)}, "NO_CERTIFICATE_OR_CRL_FOUND"),
        ({CA: key}, "NO_CERTIFICATE_OR_CRL_FOUND"),
        ({CA: str(damaged)}, ""),
        ({CERTIFICATE: own}, ""),
        ({CERTIFICATE: own, KEY: own}, ""),
        ({CERTIFICATE: own, KEY: "/nowhere"}, "No such file or directory"),
        ({CERTIFICATE: key, KEY: key}, ""),
        ({CERTIFICATE: str(damaged), KEY: key}, ""),
        ({CERTIFICATE: own, KEY: other_key}, "KEY_VALUES_MISMATCH"),
        ({CERTIFICATE: own, KEY: str(locked)}, ""),
    ):
        with monkeypatch.context() as patch:
            for name, path in variables.items():
                patch.setenv(name, path)
            files = " with ".join(f"{path} ({name})" for name, path in variables.items())
            rule = "it must be a PEM file with certificates" if CA in variables else PAIR_RULE
            message = refusal_message("rediss://host")
            assert message.startswith(f"{files} cannot be used: {reason}")
            assert message.endswith(f"; {rule}")
    assert "cannot be used: ValueError;" in refusal_message("rediss://host?ssl_ca_certs=a%00b")
    monkeypatch.setenv(KEY, key)
    assert refusal_message("rediss://host") == (
        f"{key} ({KEY}) is a key without a certificate: set {CERTIFICATE} as well"
    )


def test_an_unreadable_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(self: Path, *arguments: object, **options: object) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setenv(CA, "/etc/ca.crt")
    monkeypatch.setattr(Path, "open", forbid)  # root may read every file
    assert refusal_message("rediss://host").startswith(
        f"/etc/ca.crt ({CA}) cannot be used: Permission denied"
    )
