"""The server's certificate: real handshakes, an independent verifier, and what is refused."""

from __future__ import annotations

import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from helpers.fuzzing import parses
from hypothesis import given
from hypothesis import strategies as st

from fedveil.core.errors import ProtectionError, SettingsError
from fedveil.privacy.trust import certificates

NOW = datetime.now(UTC)
HOSTS = ["server.example", "192.0.2.7", "2001:db8::7"]
AUTHORITY_KEY, AUTHORITY = certificates.new_authority()
KEY, CERTIFICATE = certificates.new_certificate(AUTHORITY_KEY, AUTHORITY, HOSTS)
OTHER_KEY, OTHER = certificates.new_authority()
LONG_AGO = NOW - timedelta(days=400)


def verify(certificate: bytes, authority: bytes, host: str, moment: datetime | None = None) -> None:
    """As an independent verifier sees it; raise VerificationError."""
    try:
        subject: x509.verification.Subject = x509.IPAddress(ip_address(host))
    except ValueError:
        subject = x509.DNSName(host)
    builder = PolicyBuilder().store(Store([x509.load_pem_x509_certificate(authority)])).time(moment or NOW)
    builder.build_server_verifier(subject).verify(x509.load_pem_x509_certificate(certificate), [])


def shake_hands(folder: Path, key: bytes, certificate: bytes, authority: bytes, host: str) -> str:
    """What a server says to a client that trusts `authority` and knows it as `host`, over TLS on loopback."""
    (folder / "key").write_bytes(key)
    (folder / "certificate").write_bytes(certificate)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(folder / "certificate", folder / "key")
    calling = ssl.create_default_context(cadata=authority.decode())
    calling.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                try:
                    with serving.wrap_socket(connection, server_side=True) as secured:
                        secured.sendall(b"hello")
                except OSError:  # the client hung up
                    pass

        server = threading.Thread(target=serve)
        server.start()
        try:
            with (
                socket.create_connection(listener.getsockname(), timeout=20) as connection,
                calling.wrap_socket(connection, server_hostname=host) as secured,
            ):
                return secured.recv(5).decode()
        finally:
            server.join(20)


@pytest.mark.parametrize("host", [*HOSTS, *certificates.LOOPBACK])
def test_a_client_that_trusts_the_authority_talks_to_the_server_by_each_of_its_names(tmp_path, host) -> None:
    assert shake_hands(tmp_path, KEY, CERTIFICATE, AUTHORITY, host) == "hello"
    verify(CERTIFICATE, AUTHORITY, host)


@pytest.mark.parametrize("host", ["other.example", "www.server.example", "example", "192.0.2.8", "2001:db8::8"])
def test_a_server_with_another_name_is_refused(tmp_path, host) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shake_hands(tmp_path, KEY, CERTIFICATE, AUTHORITY, host)
    with pytest.raises(VerificationError):
        verify(CERTIFICATE, AUTHORITY, host)


def test_a_server_of_another_authority_is_refused(tmp_path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer"):
        shake_hands(tmp_path, KEY, CERTIFICATE, OTHER, "server.example")
    with pytest.raises(VerificationError):
        verify(CERTIFICATE, OTHER, "server.example")


def test_a_certificate_that_has_expired_or_is_of_the_future_is_refused(tmp_path) -> None:
    for made, said in ((LONG_AGO, "expired"), (NOW + timedelta(days=3), "not yet valid")):
        key, certificate = certificates.new_certificate(AUTHORITY_KEY, AUTHORITY, HOSTS, made)
        with pytest.raises(ssl.SSLCertVerificationError, match=said):
            shake_hands(tmp_path, key, certificate, AUTHORITY, "server.example")
        with pytest.raises(VerificationError):
            verify(certificate, AUTHORITY, "server.example")


def test_certificates_are_valid_from_a_day_before_until_397_days_and_ten_years_after() -> None:
    day = timedelta(days=1)
    for moment in (NOW - day + timedelta(minutes=1), NOW, NOW + 397 * day - timedelta(minutes=1)):
        verify(CERTIFICATE, AUTHORITY, "localhost", moment)
    for moment in (NOW - day - timedelta(minutes=1), NOW + 397 * day + timedelta(minutes=1)):
        with pytest.raises(VerificationError):
            verify(CERTIFICATE, AUTHORITY, "localhost", moment)
    later = NOW + 3652 * day
    certificate = certificates.new_certificate(AUTHORITY_KEY, AUTHORITY, HOSTS, later)[1]
    verify(certificate, AUTHORITY, "localhost", later)
    end = x509.load_pem_x509_certificate(AUTHORITY).not_valid_after_utc
    assert x509.load_pem_x509_certificate(certificate).not_valid_after_utc == end  # no longer than who signed it
    with pytest.raises(VerificationError):
        verify(certificate, AUTHORITY, "localhost", end + day)


def test_an_authority_signs_servers_and_no_authority_and_a_server_signs_nothing() -> None:
    authority, server = (x509.load_pem_x509_certificate(pem) for pem in (AUTHORITY, CERTIFICATE))
    constraints = authority.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
    usage = authority.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert (usage.value.key_cert_sign, usage.value.digital_signature, usage.value.crl_sign) == (True, False, False)
    usage = server.extensions.get_extension_for_class(x509.KeyUsage)
    assert (usage.value.key_cert_sign, usage.value.digital_signature) == (False, True)
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_what_an_authority_below_the_authority_signs_is_refused() -> None:
    root, signer = x509.load_pem_x509_certificate(AUTHORITY), serialization.load_pem_private_key(AUTHORITY_KEY, None)
    other = x509.load_pem_x509_certificate(OTHER)
    builder = x509.CertificateBuilder(
        root.subject, other.subject, other.public_key(), 7, NOW - timedelta(1), NOW + timedelta(9)
    )
    for extension in other.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key())
    middle = builder.add_extension(identifier, False).sign(signer, hashes.SHA384())
    certificate = certificates.new_certificate(OTHER_KEY, OTHER, HOSTS)[1]
    verify(certificate, OTHER, "localhost")
    verifier = PolicyBuilder().store(Store([root])).time(NOW).build_server_verifier(x509.DNSName("localhost"))
    with pytest.raises(VerificationError, match="path length"):
        verifier.verify(x509.load_pem_x509_certificate(certificate), [middle])


def test_every_key_and_certificate_is_another() -> None:
    pairs = [certificates.new_certificate(AUTHORITY_KEY, AUTHORITY, HOSTS) for _ in range(3)]
    assert len({key for key, _ in pairs}) == 3
    assert len({x509.load_pem_x509_certificate(certificate).serial_number for _, certificate in pairs}) == 3
    first, second = (x509.load_pem_x509_certificate(pem).subject for pem in (AUTHORITY, OTHER))
    assert first != second  # so that a verifier says which


def test_names_are_kept_in_order_once_each() -> None:
    hosts = ["Server.Example", "server.example", "127.0.0.1", "2001:DB8:0::7"]
    certificate = x509.load_pem_x509_certificate(certificates.new_certificate(AUTHORITY_KEY, AUTHORITY, hosts)[1])
    assert certificates.hosts_of(certificate) == ["server.example", "127.0.0.1", "2001:db8::7", "localhost", "::1"]


@pytest.mark.parametrize(
    "host",
    [
        "", " ", "a b", "server.example:9092", "https://server.example", "*.example", "a..b", "server.example.", "-a.example", "a-.example",
        "under_score", "bücher.example", "10.0.0.300", "10.0.0", "0.0.0.0", "::", "fe80::1%eth0", "[::1]", "a,b", "x" * 64,
        ".".join(["x" * 60] * 5), "server\nexample", "server.example\n",
    ],
)  # fmt: skip
def test_a_host_that_is_neither_name_nor_address_is_refused_by_name(host) -> None:
    with pytest.raises(SettingsError) as refusal:
        certificates.new_certificate(AUTHORITY_KEY, AUTHORITY, ["server.example", host])
    assert str(refusal.value).startswith(f"{host!r}: neither a DNS name nor an IP address")


@given(
    st.ip_addresses().filter(lambda address: not address.is_unspecified)
    | st.from_regex(r"[a-z]([a-z0-9-]{0,20}[a-z0-9])?(\.[a-z]{1,9}){0,3}", fullmatch=True)
)
def test_any_name_or_address_is_one_that_an_independent_verifier_finds(host) -> None:
    names = certificates.general_names([str(host)])
    assert names[0] == (x509.DNSName(host) if isinstance(host, str) else x509.IPAddress(host))
    assert {str(name.value) for name in names} >= {str(host), *certificates.LOOPBACK}


def test_who_did_not_sign_a_certificate_is_named() -> None:
    server, authority, other = map(x509.load_pem_x509_certificate, (CERTIFICATE, AUTHORITY, OTHER))
    certificates.check_issued(server, authority)
    with pytest.raises(ProtectionError, match=r"not signed by the authority in ca.pem \(CN=FedVeil federation"):
        certificates.check_issued(server, other)
    with pytest.raises(ProtectionError, match="is an authority's certificate"):
        certificates.check_issued(authority, authority)
    renamed = ec.generate_private_key(ec.SECP384R1())  # signs with another key, under the same name
    forged = (
        x509.CertificateBuilder(authority.subject, server.subject, server.public_key(), 7, NOW, NOW + timedelta(9))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("server.example")]), critical=False)
        .sign(renamed, hashes.SHA384())
    )
    with pytest.raises(ProtectionError, match="not signed by"):
        certificates.check_issued(forged, authority)


def test_a_key_of_another_certificate_is_refused_without_showing_it() -> None:
    certificates.check_pair(x509.load_pem_x509_certificate(CERTIFICATE), KEY)
    plain, pem = serialization.NoEncryption(), serialization.Encoding.PEM
    big = rsa.generate_private_key(65537, 2048).private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    for key, said in (
        (OTHER_KEY, "is not the key of the certificate of server.example, 192.0.2.7"),
        (b"secret words", "no private key of an elliptic curve"),
        (big, "no private key of an elliptic curve"),
        (KEY[:100], "no private key of an elliptic curve"),
    ):
        with pytest.raises(ProtectionError, match=said) as refusal:
            certificates.check_pair(x509.load_pem_x509_certificate(CERTIFICATE), key)
        assert "secret words" not in str(refusal.value)
        assert refusal.value.__context__ is None
    with pytest.raises(ProtectionError, match="is not the key of the certificate of CN=FedVeil"):
        certificates.new_certificate(OTHER_KEY, AUTHORITY, HOSTS)
    with pytest.raises(ProtectionError, match="no authority's certificate"):
        certificates.new_certificate(KEY, CERTIFICATE, HOSTS)


def test_dates_are_said_with_what_to_do() -> None:
    old = x509.load_pem_x509_certificate(certificates.new_certificate(AUTHORITY_KEY, AUTHORITY, HOSTS, LONG_AGO)[1])
    with pytest.raises(ProtectionError, match=rf"expired on {LONG_AGO + timedelta(days=397):%Y-%m-%d}.*; do this"):
        certificates.check_dates(old, "do this")
    certificates.check_dates(old, "do this", LONG_AGO)
    with pytest.raises(ProtectionError, match=r"is valid from .* on, and this machine's clock says .*: set the clock"):
        certificates.check_dates(old, "do this", LONG_AGO - timedelta(days=2))


def test_people_see_names_a_fingerprint_and_a_date() -> None:
    digest = x509.load_pem_x509_certificate(CERTIFICATE).fingerprint(hashes.SHA256()).hex()
    words = certificates.certificate_words(CERTIFICATE)
    assert words.replace("-", "").startswith(digest[:16])
    assert "server.example, 192.0.2.7, 2001:db8::7, localhost, 127.0.0.1, ::1" in words
    assert f"valid until {NOW + timedelta(days=397):%Y-%m-%d}" in words
    assert "CN=FedVeil federation" in certificates.certificate_words(AUTHORITY)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "no certificate"), (b"hello", "no certificate"), (KEY, "no certificate"), (AUTHORITY + OTHER, "holds 2")],
    ids=["nothing", "words", "a key", "two"],
)
def test_a_file_without_one_certificate_is_refused(content, said) -> None:
    with pytest.raises(ProtectionError, match=said):
        certificates.certificate_words(content)


@pytest.mark.filterwarnings("ignore:Parsed a serial number")  # a damaged one may be below zero
@parses("certificates.load_certificate", usual=500)
@given(st.data())
def test_a_damaged_certificate_is_refused_or_described(data) -> None:
    whole = x509.load_pem_x509_certificate(CERTIFICATE)
    der = bytearray(whole.public_bytes(serialization.Encoding.DER))
    for place in data.draw(st.lists(st.integers(0, len(der) - 1), min_size=1, max_size=4)):
        der[place] = data.draw(st.integers(0, 255))
    try:
        certificate = certificates.load_certificate(ssl.DER_cert_to_PEM_cert(bytes(der)).encode())
        assert certificates.certificate_name(certificate)
        certificates.check_issued(certificate, x509.load_pem_x509_certificate(AUTHORITY))
    except ProtectionError:
        return
    assert certificate.tbs_certificate_bytes == whole.tbs_certificate_bytes
