"""The open packages that the pictures and their names come from: those named here, byte for byte, or none.

They are npm packages that hold nothing but files. npm's own client fetches them, or they are given as a
folder of the archives that `npm pack` makes; nothing of them is ever run.
"""

from __future__ import annotations

import base64
import hashlib
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class PackageUnusable(Exception):
    """A package cannot be had, or is not the one that the recipe was made with; the text says which."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """One npm package, by its archive."""

    name: str
    version: str
    sha512: str
    """As the registry states it, in base 64."""
    licence: str
    """Of what is used of it."""

    @property
    def archive(self) -> str:
        """The file's name, as `npm pack` gives it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


FLAT = Package(
    name="emoji-datasource-google",
    version="16.0.0",
    sha512="ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
    licence="Apache-2.0 (pictures: Noto Emoji), MIT (names)",
)
SOLID = Package(
    name="@lobehub/fluent-emoji-3d",
    version="1.1.0",
    sha512="Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    licence="MIT (Fluent Emoji)",
)
WORDS = Package(
    name="emojilib",
    version="4.0.3",
    sha512="KbWiYre9aRSaPbHrHZIz9zmoM+21LAsK1VFJtnTh1VCtWE/rNMDviGhQTmselFl95dhqtGlY22iH0leG5BuW0g==",
    licence="MIT",
)
PACKAGES: Sequence[Package] = (FLAT, SOLID, WORDS)


def unpacked(package: Package, folder: Path) -> Path:
    """Return the folder of a package's files, fetched into `folder` if its archive is not there yet.

    Raises PackageUnusable.
    """
    place = folder / package.archive.removesuffix(".tgz")
    if place.is_dir():
        return place / "package"
    archive = folder / package.archive
    if not archive.is_file():
        _fetch(package, folder)
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if digest != package.sha512:
        raise PackageUnusable(f"{archive} is not {package.name} {package.version}: its SHA-512 is {digest}")
    unfinished = folder / f".{place.name}"
    with tarfile.open(archive) as files:
        files.extractall(unfinished, filter="data")
    unfinished.rename(place)
    return place / "package"


def _fetch(package: Package, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    wanted = f"{package.name}@{package.version}"
    command = ["npm", "pack", "--ignore-scripts", "--pack-destination", str(folder), wanted]
    try:
        # Nothing of the command is a user's.
        subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    except FileNotFoundError as error:
        raise PackageUnusable(
            f"there is no npm to fetch {wanted} with; put {package.archive} into {folder}"
        ) from error
    except subprocess.CalledProcessError as error:
        raise PackageUnusable(f"npm gave no {wanted}: {error.stderr}") from error
