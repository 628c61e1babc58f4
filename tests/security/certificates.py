"""Certificates of authorities that live as long as one test."""

from __future__ import annotations

import datetime
import ipaddress
import itertools
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

_serial = itertools.count(1)


class Authority:
    """A certificate authority; its files lie in `folder`."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        # Each its own: of two of one name, verification tries the wrong key and says something else.
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"{name} {next(_serial)}")])
        self.certificate, _ = self._written(name, self._name, self._key, host=None, ended=False)

    def issue(self, name: str, *, host: str = "127.0.0.1", ended: bool = False) -> tuple[Path, Path]:
        """Return files of a certificate for an address or name of a host, and of its private key."""
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        return self._written(name, subject, ec.generate_private_key(ec.SECP256R1()), host=host, ended=ended)

    def _written(
        self, name: str, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, host: str | None, ended: bool
    ) -> tuple[Path, Path]:
        now = datetime.datetime.now(datetime.UTC)
        until = now + datetime.timedelta(hours=-1 if ended else 1)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=2))
            .not_valid_after(until)
            .add_extension(x509.BasicConstraints(ca=host is None, path_length=None), critical=True)
        )
        if host is not None:
            builder = builder.add_extension(x509.SubjectAlternativeName([_alternative(host)]), critical=False)
        paths = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        paths[0].write_bytes(
            builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        )
        paths[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return paths


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
