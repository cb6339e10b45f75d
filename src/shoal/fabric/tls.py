"""TLS without an authority: the listener's own key is the authority, and its certificate follows from that key.

Every certificate field of the authority is fixed but its public key, which is the listener's identity key. So a
ticket pins the listener by 32 bytes, both sides make the same trust anchor from them, and a restart changes nothing.
The listener signs a leaf certificate with its identity key (rustls refuses an authority as end entity); the leaf's
own key lives in memory and dies with the process.

Two remarks for reviewers. The joining side cannot make the authority's self-signature and puts any other in its
place: a trust anchor's signature is not checked (RFC 5280, section 6.1.1, takes only name and key from it). And the
identity key signs two kinds of things, certificates and envelopes: envelopes start with a text that is no DER.
"""

from __future__ import annotations

import base64
import datetime
import ssl
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from shoal.fabric.identity import Identity

NOT_BEFORE = datetime.datetime(2020, 1, 1)
NOT_AFTER = datetime.datetime(2049, 12, 31)
"""Fixed and wide: validity is not what protects here, and a worker's clock may be off."""

AUTHORITY = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "shoal listener")])


def authority_pem(public_key: bytes) -> bytes:
    """The trust anchor of the listener with this raw Ed25519 public key.

    Raises:
        ValueError: these bytes are no Ed25519 public key.
    """
    return (
        _builder(AUTHORITY, Ed25519PublicKey.from_public_bytes(public_key), serial=1)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(Ed25519PrivateKey.generate(), None)
        .public_bytes(Encoding.PEM)
    )


def listener_config(identity: Identity) -> dict[str, Any]:
    """Zenoh settings with which a listener proves that it owns `identity`."""
    key = Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "shoal node")])
    leaf = (
        _builder(name, key.public_key(), serial=x509.random_serial_number())
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("shoal")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(identity.private_key, None)
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return {
        "transport/link/tls/listen_certificate_base64": base64.b64encode(leaf.public_bytes(Encoding.PEM)).decode(),
        "transport/link/tls/listen_private_key_base64": base64.b64encode(private).decode(),
        "transport/link/tls/enable_mtls": False,
    }


def connector_config(public_key: bytes) -> dict[str, Any]:
    """Zenoh settings with which a node accepts only the listener that owns `public_key`."""
    return {
        "transport/link/tls/root_ca_certificate_base64": base64.b64encode(authority_pem(public_key)).decode(),
        "transport/link/tls/verify_name_on_connect": False,  # The pin is the authority itself; names prove nothing.
        "transport/link/tls/enable_mtls": False,
    }


def probe_context(public_key: bytes) -> ssl.SSLContext:
    """The same check as `connector_config`, for a trial handshake whose failure has a name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=authority_pem(public_key).decode())
    return context


def _builder(subject: x509.Name, public_key: Ed25519PublicKey, serial: int) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(AUTHORITY)
        .public_key(public_key)
        .serial_number(serial)
        .not_valid_before(NOT_BEFORE)
        .not_valid_after(NOT_AFTER)
    )
