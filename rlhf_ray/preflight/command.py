"""`rlhf-ray preflight`: reads a configuration of any training command, checks it, and prints what it finds."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlhf_ray.config.load import load_config
from rlhf_ray.config.reward_model import RewardModelConfig
from rlhf_ray.config.settings import PPOConfig, SFTConfig
from rlhf_ray.failures import BadInput
from rlhf_ray.preflight.examine import Site, TrainingConfig, examine
from rlhf_ray.preflight.findings import Finding, Findings, State
from rlhf_ray.preflight.needs import Need

COMMANDS: dict[str, tuple[str, type[TrainingConfig]]] = {
    "text": ("sft", SFTConfig),
    "prompts": ("ppo", PPOConfig),
    "pairs": ("train-rm", RewardModelConfig),
}
"""By a section that only this command's configuration has."""
_MARKS = {State.OK: "[green]✓[/green]", State.CHANGE: "[bold red]✗[/bold red]", State.UNKNOWN: "[yellow]?[/yellow]"}
_HUB_TIMEOUT_S = 3.0


def run_preflight(path: Path, overrides: Sequence[str] = (), resume: bool = False) -> bool:
    """Everything `rlhf-ray preflight` does.

    Returns:
        Whether nothing has to be changed.
    """
    console = Console(highlight=False)
    _skip_an_unreachable_hub()
    console.print(f"[bold]Preflight of {escape(str(path))}[/bold]\n")
    findings = Findings(partial(_show, console))
    needs = preflight(path, overrides, findings, resume)
    if any(need.memory for need in needs):
        console.print(_memory_table(needs))
    console.print(_summary(findings))
    return not findings.of(State.CHANGE)


def preflight(
    path: Path, overrides: Sequence[str], findings: Findings, resume: bool = False, site: Site | None = None
) -> list[Need]:
    """Read a configuration and check everything; see `examine`."""

    def read() -> tuple[str, TrainingConfig]:
        command, kind = _command_of(path)
        return command, load_config(kind, path, overrides)

    found = findings.check("configuration", read, lambda found: f"of `{found[0]}`, run '{found[1].run.name}'")
    return [] if found is None else examine(found[1], findings, resume, site)


def _command_of(path: Path) -> tuple[str, type[TrainingConfig]]:
    """Whose configuration it is; what is wrong with the file itself is said by any of their loaders."""
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        sections = None
    if not isinstance(sections, dict):
        return COMMANDS["prompts"]
    for section, command in COMMANDS.items():
        if section in sections:
            return command
    raise BadInput(str(path), "is of none of sft, ppo and train-rm", f"one of the sections {', '.join(COMMANDS)}")


def _skip_an_unreachable_hub() -> None:
    """The hub's client tries each file for half a minute. Behind a proxy only it can say whether the hub is there."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "HF_HUB_OFFLINE")):
        return
    place = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        socket.create_connection((place.hostname or "", place.port or 443), timeout=_HUB_TIMEOUT_S).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


def _show(console: Console, finding: Finding) -> None:
    line = Table.grid(padding=(0, 1))
    line.add_column(width=1)
    line.add_column(width=24, overflow="fold")
    line.add_column(overflow="fold")
    arrow = f"\n[bold]→ {escape(finding.allowed)}[/bold]" if finding.allowed else ""
    line.add_row(_MARKS[finding.state], escape(finding.what), escape(finding.found) + arrow)
    console.print(line)


def _memory_table(needs: Sequence[Need]) -> Table:
    """What one process of each role needs at its peak, computed."""
    on_gpu = any(need.memory.device for need in needs if need.memory)
    table = Table(title="Memory of one process at its peak, computed, GB", title_justify="left")
    for name in ("role", "processes", "in the node", *(["on its GPU"] if on_gpu else [])):
        table.add_column(name, justify="left" if name == "role" else "right")
    table.add_column("of what")
    for need in needs:
        if need.memory is None:
            continue
        host, device = need.memory.host, need.memory.device
        largest = sorted((device or host).items(), key=lambda part: -part[1])
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in largest if size >= 5e6)
        figures = [f"{need.memory.first_bytes / 1e9:.2f}"]
        figures += [f"{need.memory.device_bytes / 1e9:.2f}" if device else ""] if on_gpu else []
        table.add_row(need.request.role, str(need.request.settings.replicas), *figures, parts)
    return table


def _summary(findings: Findings) -> str:
    changes, unknown = len(findings.of(State.CHANGE)), len(findings.of(State.UNKNOWN))
    known = f"{len(findings.of(State.OK))} checks passed"
    rest = f", {unknown} could not be made here" if unknown else ""
    if changes:
        return f"\n[bold red]{changes} to change[/bold red]; {known}{rest}"
    return f"\n[bold green]Nothing to change[/bold green]: {known}{rest}"
