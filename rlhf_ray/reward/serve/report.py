"""The service's state in the terminal."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.table import Table


def show_status(status: dict[str, Any], console: Console | None = None) -> None:
    """Print what `GET /v1/service` answers: models, candidates, drift, errors, and what happened last."""
    console = console or Console()
    console.print(_models(status))
    if status["candidates"]:
        console.print(_candidates(status))
    if status["drift"]:
        console.print(_drift(status))
    if status["errors"]:
        console.print("errors: " + ", ".join(f"{name} {count}" for name, count in status["errors"].items()))
    for event in status["events"][-10:]:
        console.print(f"{time.strftime('%H:%M:%S', time.localtime(event['time']))}  {event['what']}")


def _models(status: dict[str, Any]) -> Table:
    table = Table("model", "version", "state", "share", "texts", "ms/text", "why", title="models")
    for row in status["models"]:
        table.add_row(
            row["name"],
            row["version"] or "–",
            row["role"].replace("_", " "),
            f"{row['share']:.0%}",
            f"{row['texts']:,}",
            _figure(row["compute_ms_per_text"], ".2f"),
            row["reason"] or "",
        )
    return table


def _candidates(status: dict[str, Any]) -> Table:
    table = Table("candidate", "as", "texts", "sign flips", "Kendall τ", "shift (std)", "time a token", "failures", "")
    table.title = "against the live model"
    for row in status["candidates"]:
        table.add_row(
            row["name"],
            row["role"],
            f"{row['texts']:,}",
            _figure(row["sign_flip_rate"], ".1%"),
            _figure(row["kendall_tau"], ".3f"),
            _figure(row["score_shift"], "+.2f"),
            _figure(row["latency_ratio"], ".2f"),
            _figure(row["failure_rate"], ".2%"),
            "rolled back" if row["rolled_back"] else "",
        )
    return table


def _drift(status: dict[str, Any]) -> Table:
    table = Table("model", "quantity", "texts", "KS", "p", "windows", "alarms", "", title="drift from training")
    for row in status["drift"]:
        table.add_row(
            row["model"],
            row["quantity"],
            f"{row['texts']:,}",
            _figure(row["ks"], ".3f"),
            _figure(row["p_value"], ".2g"),
            str(row["windows"]),
            str(row["alarms"]),
            "alarm" if row["alarm"] else "",
        )
    return table


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
