"""The certificate that a front door shows, and the authority whose certificates clients must show.

The files are looked at again for each new connection: whoever renews certificates replaces them and restarts
nothing. While what lies there cannot be used, half written for example, the last good ones stay in use.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import grpc
import structlog

from scheduler.settings import FrontDoor as FrontDoorSettings

_log = structlog.get_logger()


class TlsUnusable(OSError):
    """The TLS files cannot be read, or are not what they should be."""


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """PEM files of one service."""

    certificate: Path
    """Of the service, and of the authorities between it and the one that clients know."""
    key: Path
    client_ca: Path | None
    """Given: clients must show a certificate of this authority."""

    @classmethod
    def of(cls, settings: FrontDoorSettings) -> TlsFiles | None:
        """Return the files that the settings name; None: plain text."""
        if settings.tls_certificate is None or settings.tls_key is None:
            return None
        return cls(
            certificate=settings.tls_certificate, key=settings.tls_key, client_ca=settings.tls_client_ca
        )

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials that follow the files. Raises TlsUnusable if they are no good now."""
        follower = _Follower(self)
        return grpc.dynamic_ssl_server_credentials(
            follower.now,
            # The library's documentation says that None is for no change; its types do not.
            cast(Callable[[], grpc.ServerCertificateConfiguration], follower.newer),
            require_client_authentication=self.client_ca is not None,
        )

    def stamp(self) -> tuple[object, ...]:
        """Return what changes when a file does. Raises OSError."""
        files = (self.certificate, self.key, *filter(None, [self.client_ca]))
        # By the file that is there in the end: a mounted secret is a link that is pointed elsewhere.
        looks = [file.stat() for file in files]
        return tuple((look.st_ino, look.st_mtime_ns, look.st_size) for look in looks)

    def read(self) -> grpc.ServerCertificateConfiguration:
        """Return what the files hold. Raises TlsUnusable."""
        # The library would take anything, and then fail every handshake.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # With a password, or it would ask the terminal for that of a key that has one.
            context.load_cert_chain(self.certificate, self.key, password="")
        except OSError as wrong:
            raise TlsUnusable(
                f"{self.certificate} and {self.key} must be a certificate and its private key as PEM, which "
                f"this process may read: {wrong}"
            ) from wrong
        try:
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
        except OSError as wrong:
            raise TlsUnusable(
                f"{self.client_ca} must be certificates of authorities as PEM, which this process may read: "
                f"{wrong}"
            ) from wrong
        try:
            return grpc.ssl_server_certificate_configuration(
                [(self.key.read_bytes(), self.certificate.read_bytes())],
                root_certificates=None if self.client_ca is None else self.client_ca.read_bytes(),
            )
        except OSError as gone:
            raise TlsUnusable(f"{gone.filename} went away while it was read") from gone


class _Follower:
    """Called by gRPC's own threads, one handshake at a time or several."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        try:
            self._stamp = files.stamp()
        except OSError as gone:
            raise TlsUnusable(f"{gone.filename}: {gone.strerror}") from gone
        self.now = files.read()

    def newer(self) -> grpc.ServerCertificateConfiguration | None:
        """Return what the files hold now, None if that is what they held before, or is of no use."""
        try:
            stamp = self._files.stamp()
            if stamp == self._stamp:
                return None
            renewed = self._files.read()
        except OSError as trouble:
            # Tried again at the next handshake: a renewal is two files, and may be between them.
            _log.warning("TLS files were not taken up", trouble=str(trouble))
            return None
        self._stamp = stamp
        _log.info("TLS files were taken up", certificate=str(self._files.certificate))
        return renewed
