"""The certificate of a federation's server, signed by an authority that serves this federation alone.

Clients trust that authority and no other. Its key signs new certificates, and is needed for nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv6Address, ip_address

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedveil.core.errors import ProtectionError, SettingsError
from fedveil.core.foreign import reading
from fedveil.privacy.homomorphic.keys import fingerprint

AUTHORITY, AUTHORITY_KEY = "ca.pem", "ca.key"
CERTIFICATE, CERTIFICATE_KEY = "server.pem", "server.key"
LOOPBACK = ("localhost", "127.0.0.1", "::1")  # names in every server certificate, for tests and tunnels

_AUTHORITY_DAYS, _SERVER_DAYS = 3653, 397
_EARLIER = timedelta(days=1)  # because clocks disagree
_LABEL = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)")


def new_authority(now: datetime | None = None) -> tuple[bytes, bytes]:
    """Make a new authority for ten years: its private key and its certificate, PEM.

    now: with a time zone; by default the clock's time
    """
    now = now or datetime.now(UTC)
    key = ec.generate_private_key(ec.SECP384R1())
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    name = _name(f"FedVeil federation {identifier.digest.hex()[:8]}")
    builder = _builder(name, name, key.public_key(), now, now + timedelta(days=_AUTHORITY_DAYS))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(certificates=True), critical=True)
    return _private_pem(key), _pem(builder.sign(key, hashes.SHA384()))


def new_certificate(
    authority_key: bytes, authority: bytes, hosts: Sequence[str], now: datetime | None = None
) -> tuple[bytes, bytes]:
    """Make a new key and certificate for a server: the private key and the certificate, PEM.

    The certificate is valid for 397 days, but no longer than the authority's.
    authority_key, authority: as `new_authority` made them; hosts: DNS names and IP addresses, to which LOOPBACK is
    added
    now: with a time zone; by default the clock's time
    Raise SettingsError where a host is neither, ProtectionError where the key is not the authority's.
    """
    now = now or datetime.now(UTC)
    names = general_names(hosts)
    issuer = load_authority(authority)
    check_pair(issuer, authority_key)
    signer = _private_key(authority_key)
    key = ec.generate_private_key(ec.SECP384R1())
    end = min(now + timedelta(days=_SERVER_DAYS), issuer.not_valid_after_utc)
    builder = _builder(_name("FedVeil server"), issuer.subject, key.public_key(), now, end)
    for extension, critical in (
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False),
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage(certificates=False), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (x509.SubjectAlternativeName(names), False),
    ):
        builder = builder.add_extension(extension, critical)
    return _private_pem(key), _pem(builder.sign(signer, hashes.SHA384()))


def general_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """Return the names in a certificate for these hosts, each once, and LOOPBACK.

    Raise SettingsError for an invalid host.
    """
    names = dict.fromkeys(_host(host) for host in [*hosts, *LOOPBACK])
    return [x509.DNSName(name) if isinstance(name, str) else x509.IPAddress(name) for name in names]


def _host(host: str) -> str | IPv4Address | IPv6Address:
    try:
        address = ip_address(host)
    except ValueError:
        name = host.lower()
        labels = name.split(".")
        # no top-level domain is a number, so 10.0.0.300 is a mistyped address (RFC 3696, section 2)
        if len(name) <= 253 and all(map(_LABEL.fullmatch, labels)) and not labels[-1].isdigit():
            return name
    else:
        if not address.is_unspecified and "%" not in host:
            return address
    raise SettingsError(
        f"{host!r}: neither a DNS name nor an IP address that clients can reach; give it as they will, without a port, "
        "as in server.example or 192.0.2.7 or 2001:db8::7 (a name in other letters in its xn-- form)"
    )


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """Return the DNS names and IP addresses that a certificate names, in its order."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in names if isinstance(name, x509.DNSName | x509.IPAddress)]


def load_certificate(pem: bytes) -> x509.Certificate:
    """Read the one certificate in a PEM file.

    Raise ProtectionError where it holds none, several, or a malformed one.
    """
    with reading(lambda _: ProtectionError("holds no certificate in PEM format that can be read")):
        found = x509.load_pem_x509_certificates(pem)
        for certificate in found:  # its parts are parsed only when they are read
            _ = certificate.subject, certificate.issuer, certificate.extensions, certificate.public_key()
    if len(found) != 1:
        raise ProtectionError(f"holds {len(found)} certificates, and must hold one")
    return found[0]


def load_authority(pem: bytes) -> x509.Certificate:
    """Read an authority's certificate in a PEM file; raise ProtectionError where it is none."""
    certificate = load_certificate(pem)
    if not _is_authority(certificate):
        raise ProtectionError("is no authority's certificate: it may sign no others")
    return certificate


def check_issued(certificate: x509.Certificate, authority: x509.Certificate) -> None:
    """Raise ProtectionError where the authority did not sign a server's certificate, or where that may sign others."""
    if _is_authority(certificate):
        raise ProtectionError("is an authority's certificate, and no server's")
    signed = f"is not signed by the authority in {AUTHORITY} ({certificate_name(authority)})"
    with reading(lambda _: ProtectionError(signed)):
        certificate.verify_directly_issued_by(authority)


def check_pair(certificate: x509.Certificate, key: bytes) -> None:
    """Raise ProtectionError where a private key in PEM is not that of a certificate."""
    spki = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    if _private_key(key).public_key().public_bytes(*spki) != certificate.public_key().public_bytes(*spki):
        raise ProtectionError(f"is not the key of the certificate of {certificate_name(certificate)}")


def check_dates(certificate: x509.Certificate, remedy: str, now: datetime | None = None) -> None:
    """Raise ProtectionError where a certificate has expired, or is not valid yet.

    remedy: what to do about one that has expired; now: with a time zone; by default the clock's time
    """
    now = now or datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        raise ProtectionError(f"expired on {_time(certificate.not_valid_after_utc)}; {remedy}")
    if now < certificate.not_valid_before_utc:
        raise ProtectionError(
            f"is valid from {_time(certificate.not_valid_before_utc)} on, and this machine's clock says {_time(now)}: set the clock"
        )


def certificate_name(certificate: x509.Certificate) -> str:
    """Return the name of a certificate for people: a server's hosts, or its subject."""
    return ", ".join(hosts_of(certificate)) or certificate.subject.rfc4514_string() or "no name"


def certificate_words(pem: bytes) -> str:
    """Describe a certificate: the start of its SHA-256 fingerprint, its names, and until when it is valid.

    Raise ProtectionError where it cannot be read.
    """
    certificate = load_certificate(pem)
    digest = fingerprint(certificate.fingerprint(hashes.SHA256()))
    return f"{digest}  {certificate_name(certificate)}, valid until {_time(certificate.not_valid_after_utc)}"


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, now: datetime, end: datetime
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder(issuer, subject, public, x509.random_serial_number(), now - _EARLIER, end)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)


def _name(words: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, words)])


def _usage(certificates: bool) -> x509.KeyUsage:
    """Return the permission to sign certificates and nothing else, or to sign in a handshake and nothing else."""
    return x509.KeyUsage(
        digital_signature=not certificates, key_cert_sign=certificates, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, crl_sign=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _private_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        with reading(ProtectionError):
            key = serialization.load_pem_private_key(pem, password=None)
    except ProtectionError:  # the library's message may quote the key
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ProtectionError("holds no private key of an elliptic curve in PEM format without a passphrase") from None
    return key


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _time(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
