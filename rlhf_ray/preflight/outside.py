"""What leaves this machine with a run: the folder that a job is submitted with, and secrets in the configuration."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel
from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE, get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, _dir_travel, _get_excludes

from rlhf_ray.preflight.findings import Findings

_SECRET_VALUE = re.compile(
    r"\b(hf_\w{16,}|sk-[\w-]{16,}|gh[opsu]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|xox[abp]-[\w-]{10,}"
    r"|AKIA[0-9A-Z]{16}|wandb_v1_\w{16,})|://[^/\s:@]+:[^/\s@]+@"
)


def check_secrets(findings: Findings, config: BaseModel) -> None:
    """See that no value in a role's environment looks like a secret; names that say so are refused when the
    configuration is read. It is kept in the run's folder, and Ray shows the environment of its actors."""
    found = False
    for key, value in _environments(config, ""):
        if _SECRET_VALUE.search(value):
            found = True
            findings.change(
                key,
                f"a secret of {len(value)} characters, which the run's config.yaml would keep",
                "a file that only you can read, such as HF_TOKEN_PATH; or the environment that Ray is started in",
            )
    if not found:
        findings.ok("secrets", "none in the env of a role")


def check_working_directory(findings: Findings, folder: Path, is_joined: bool) -> None:
    """See that `ray job submit --working-dir` could upload a folder.

    Args:
        is_joined: the run is on a running cluster, so that it may be submitted.
    """
    size, largest = working_directory_bytes(folder)
    found = f"'{folder}' is {size / (1 << 20):.1f} MiB without what .gitignore and .rayignore leave out"
    limit = f"less than {GCS_STORAGE_MAX_SIZE >> 20} MiB, Ray's limit for `ray job submit --working-dir`"
    # Ray's package is not compressed.
    if size < GCS_STORAGE_MAX_SIZE:
        findings.ok("working directory", f"{found}; {limit}")
        return
    found += f" (the largest file is '{largest}')"
    if is_joined:
        findings.change("working directory", found, f"{limit}; list what is not needed in .rayignore")
    else:
        findings.unknown("working directory", f"{found}, too large to be submitted as a job; {limit}")


def working_directory_bytes(folder: Path) -> tuple[int, Path]:
    """What Ray would upload of a folder, and the largest file of it."""
    files: dict[Path, int] = {}

    def count(path: Path) -> None:
        if path.is_file():
            files[path] = path.stat().st_size

    quiet = logging.getLogger(__name__)
    _dir_travel(
        folder.absolute(),
        [_get_excludes(folder.absolute(), get_runtime_env_default_excludes())],
        count,
        include_gitignore=os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1",
        logger=quiet,
    )
    return sum(files.values()), max(files, key=lambda path: files[path], default=folder)


def _environments(settings: BaseModel, prefix: str) -> Iterator[tuple[str, str]]:
    """Key and value of every entry of an `env`, wherever it is in the configuration."""
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if name == "env":
            yield from ((f"{prefix}env.{variable}", text) for variable, text in value.items())
        several = isinstance(value, tuple) and len(value) > 1
        for place, section in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(section, BaseModel):
                yield from _environments(section, f"{prefix}{name}.{f'{place}.' if several else ''}")
