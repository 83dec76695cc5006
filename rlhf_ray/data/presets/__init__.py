"""Presets: real models and data as ordinary local folders, written once by `rlhf-ray prepare`.

A preset is built in a temporary folder beside its place and moved there in one step, so a folder is
either absent or complete. Its `preset.json` says where it came from and lists every file with its size;
a folder that does not match its own list is built again.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf_ray.data.presets import chain_sum, hutto, minilm, smollm2, tiny
from rlhf_ray.data.presets.packages import PinnedPackage, fetch
from rlhf_ray.failures import BadInput, PresetError

__all__ = ["PRESETS", "Preset", "PresetError", "prepare"]

MANIFEST = "preset.json"
Report = Callable[[str], None]


@dataclass(frozen=True)
class Preset:
    """One thing that `rlhf-ray prepare` can write.

    Attributes:
        format_version: raised whenever the written files change; an older folder is built again.
        package: where the source comes from; None if it is made here.
        build: writes into an empty folder; gets the source archive, that folder and the reporter, and
            returns what `preset.json` should say besides. It may use the folder's parent for scratch files.
    """

    format_version: int
    package: PinnedPackage | None
    build: Callable[[Path, Path, Report], dict[str, object]]


PRESETS = {
    "smollm2-135m": Preset(smollm2.FORMAT_VERSION, smollm2.PACKAGE, smollm2.build),
    "minilm": Preset(minilm.FORMAT_VERSION, minilm.PACKAGE, minilm.build),
    "hutto-movie": Preset(hutto.FORMAT_VERSION, hutto.PACKAGE, hutto.build),
    "chain-sum": Preset(chain_sum.FORMAT_VERSION, None, chain_sum.build),
    "tiny": Preset(tiny.FORMAT_VERSION, None, tiny.build),
}


def prepare(name: str, data_root: Path, report: Report) -> Path:
    """Make `<data_root>/<name>` if it is not there yet.

    Args:
        name: one of `PRESETS`.
        data_root: folder of all presets, `paths.data` in a configuration.
        report: told in a line each what is going on.

    Returns:
        The preset's folder.

    Raises:
        BadInput: unknown name, or something else lies where the folder should be.
        PresetError: the source cannot be fetched or has the wrong hash.
    """
    if name not in PRESETS:
        raise BadInput("preset", f"'{name}' is unknown", f"one of: {', '.join(PRESETS)}")
    preset, place = PRESETS[name], data_root / name
    if _is_complete(place, preset):
        report(f"{name}: already in {place}")
        return place
    if place.exists() and not _may_be_replaced(place):
        raise BadInput(
            str(place), f"holds something else, there is no {MANIFEST}", "remove it or choose another data folder"
        )
    try:
        data_root.mkdir(parents=True, exist_ok=True)
        scratch_folder = tempfile.TemporaryDirectory(dir=data_root, prefix=f".{name}-", ignore_cleanup_errors=True)
    except OSError as error:
        raise BadInput(
            str(data_root), f"cannot be written ({error.strerror})", "a folder that can be written"
        ) from None
    with scratch_folder as scratch:
        target = Path(scratch, "result")
        target.mkdir()
        archive = Path(scratch)
        if preset.package is not None:
            report(f"{name}: fetching {preset.package.name} {preset.package.version}")
            archive = fetch(preset.package, Path(scratch))
        details = preset.build(archive, target, lambda line: report(f"{name}: {line}"))
        _write_manifest(target, name, preset, details)
        _put_in_place(target, place, preset)
    report(f"{name}: written to {place}")
    return place


def _identity(preset: Preset) -> dict[str, object]:
    return {"format_version": preset.format_version, "package": preset.package and asdict(preset.package)}


def _write_manifest(target: Path, name: str, preset: Preset, details: dict[str, object]) -> None:
    files = {
        path.relative_to(target).as_posix(): path.stat().st_size for path in sorted(target.rglob("*")) if path.is_file()
    }
    manifest = {"preset": name, **_identity(preset), "details": details, "files": files}
    (target / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _is_complete(place: Path, preset: Preset) -> bool:
    """Whether the folder was written by this version of the preset and still has every file."""
    try:
        manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        matches = all(manifest[key] == value for key, value in _identity(preset).items())
        return matches and all((place / file).stat().st_size == size for file, size in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _may_be_replaced(place: Path) -> bool:
    return place.is_dir() and ((place / MANIFEST).is_file() or not any(place.iterdir()))


def _put_in_place(target: Path, place: Path, preset: Preset) -> None:
    """Rename into place; what was there goes with the scratch folder."""
    if place.exists():
        os.replace(place, target.parent / "replaced")
    try:
        os.replace(target, place)
    except OSError:
        # Another process may have finished the same preset in the meantime.
        if not _is_complete(place, preset):
            raise
        shutil.rmtree(target)
