"""What fills up, is shut, does not answer or jumps on the machine that a run is on."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.chaos_site import DEADLINE_S, Outcome, Site
from bench.results import Report, Result
from tests.system.commands import rows_of, wait_until

_HOUR_S = 3600
_SET_BACK = Path(__file__).parent / "set_back"


def machine(site: Site, alone: Outcome, report: Report) -> None:
    """All of it, one after another."""
    for part in (disk_full, store_full, unwritable, unreachable, clock_set_back):
        report.add(part(site, alone), part.__name__.replace("_", " "))


def disk_full(site: Site, alone: Outcome) -> list[Result]:
    """The disk has room for one checkpoint and half of the next."""
    checkpoints = sorted(site.folder("alone-on-a-sound-machine").glob("checkpoints/step-*"))
    size = sum(path.stat().st_size for path in checkpoints[-1].rglob("*") if path.is_file())
    with mounted(site.runs / "disk", f"size={int(1.5 * size) + (1 << 20)}") as disk:
        full = site.run("disk/run")
        named = "No space left" in full.error or "make room" in full.error
        left = [path.parent.name for path in disk.glob("run/tiny-ppo/checkpoints/*/manifest.json")]
        print(f"disk full: status {full.status}, {full.error}; checkpoints {left}", flush=True)
        subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
        resumed = site.run("disk/run", "--resume")
        print(resumed.error, flush=True)
        kept = site.runs / "disk-events.jsonl"
        shutil.copy(site.folder("disk/run") / "events.jsonl", kept)
        resumed_from = [int(row["step"]) for row in rows_of(kept) if row["kind"] == "checkpoint_loaded"]
    return [
        Result("disk full: the run ends", int(full.status != 0), target=">= 1"),
        Result("disk full: with that cause", int(named), target=">= 1"),
        Result("disk full: sound checkpoints left", len(left), target=">= 1"),
        Result("disk full: resumed from step", max(resumed_from, default=0), target=">= 1"),
        Result("disk full: resumed with room, equal to the run left alone", int(resumed.equals(alone)), target=">= 1"),
    ]


def store_full(site: Site, alone: Outcome) -> list[Result]:
    """A generator keeps objects of more than the store's size while the run goes on."""
    fault = site.fault("store", "generator", "fill", "busy", 6)
    outcome = site.run("store", faults=[fault])
    struck = Path(fault.mark).exists()
    print(f"object store full: status {outcome.status}, {outcome.error}", flush=True)
    return [
        Result("object store full: it was", int(struck), target=">= 1"),
        Result("object store full: equal to the run left alone", int(outcome.equals(alone)), target=">= 1"),
    ]


def unwritable(site: Site, _: Outcome) -> list[Result]:
    with mounted(site.runs / "shut", "size=1m") as folder:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        command = site.begin("shut", output=site.runs / "shut-output")
        command.wait(DEADLINE_S)
        said = command.stderr.strip().splitlines()[-1:] or [""]
        print(f"unwritable folder: status {command.process.returncode}, {said[0]}", flush=True)
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
    return [
        Result("unwritable folder: status", command.process.returncode, target=">= 2"),
        Result("unwritable folder: seconds until it says so", command.seconds, "s", "<= 60 s"),
        Result("unwritable folder: named", int("paths.runs" in said[0] or "shut" in said[0]), target=">= 1"),
    ]


def unreachable(site: Site, alone: Outcome) -> list[Result]:
    """Nobody answers at W&B's address."""
    nobody = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    outcome = site.run("wandb", "tracking.wandb.mode=online", environment=nobody)
    told = [event["cause"] for event in outcome.events if event["kind"] == "sink_failed"]
    kept = list(site.folder("wandb").glob("wandb/offline-run-*/*.wandb"))
    print(f"W&B unreachable: status {outcome.status}, {told}", flush=True)
    return [
        Result("W&B unreachable: said once", len(told), target=">= 1"),
        Result("W&B unreachable: kept offline", len(kept), target=">= 1"),
        Result("W&B unreachable: equal to the run left alone", int(outcome.equals(alone)), target=">= 1"),
    ]


def clock_set_back(site: Site, alone: Outcome) -> list[Result]:
    """The wall clock of all Python processes jumps back by an hour after the second step."""
    offset = site.runs / "clock-offset"
    path = os.pathsep.join([str(_SET_BACK), os.environ.get("PYTHONPATH", "")])
    command = site.begin("clock", environment={"PYTHONPATH": path, "CLOCK_OFFSET": str(offset)})
    rows = site.folder("clock") / "metrics.jsonl"
    wait_until(lambda: len(rows_of(rows)) >= 2 or command.process.poll() is not None, DEADLINE_S, "two steps")
    offset.write_text(f"-{_HOUR_S}", encoding="utf-8")
    command.wait(DEADLINE_S)
    outcome = site.outcome("clock", command)
    jumps = [event for event in outcome.events if event["kind"] == "clock_jumped"]
    print(f"clock set back: status {outcome.status}, {outcome.error}; {jumps}", flush=True)
    negative = sum(
        1
        for row in rows_of(rows)
        for name, value in row.items()
        if name.startswith("time/") and value is not None and value < 0
    )
    return [
        Result("clock set back: said", len(jumps), target=">= 1"),
        Result("clock set back: negative times", negative, target="<= 0"),
        Result("clock set back: equal to the run left alone", int(outcome.equals(alone)), target=">= 1"),
    ]


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own, in memory."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
