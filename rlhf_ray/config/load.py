"""From a YAML file and `section.key=value` overrides to typed settings, or to one line that says what is wrong."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from rlhf_ray.config.base import names_a_secret
from rlhf_ray.config.settings import RunConfig
from rlhf_ray.failures import BadInput

Config = TypeVar("Config", bound=RunConfig)
_SHORTEST_SECRET = 16
"""Shorter values of the environment are too likely to be in the settings by chance."""


def load_config(cls: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override, resolve and check a configuration.

    Args:
        cls: the settings to end up with.
        path: YAML file; `${section.key}` and `${oc.env:NAME}` are resolved by OmegaConf.
        overrides: `section.key=value`, YAML on the right.

    Raises:
        BadInput: naming the file and line or the override, the key, and what would be allowed.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text) or yaml.MappingNode("tag:yaml.org,2002:map", [])
        document = OmegaConf.create(text)
    except FileNotFoundError:
        raise BadInput(str(path), "there is no such file", "the path of a YAML configuration") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(str(path), f"cannot be read ({error})", "a readable YAML file") from None
    except yaml.MarkedYAMLError as error:
        where = f"{path}:{error.problem_mark.line + 1}" if error.problem_mark else str(path)
        raise BadInput(where, f"is not valid YAML ({error.problem})", "a YAML mapping of sections") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise BadInput(str(path), f"is not valid YAML ({_one_line(error)})", "a YAML mapping of sections") from None
    if not isinstance(document, DictConfig):
        raise BadInput(str(path), f"is a {type(document).__name__}", "a YAML mapping of sections")
    parsed = [_parse_override(override) for override in overrides]
    try:
        merged = OmegaConf.merge(OmegaConf.create(_defaults(cls)), document)
        for key, value in parsed:
            # A list takes the place of whatever is there; `reward.0.weight` names an entry of one.
            OmegaConf.update(merged, key, value, merge=not isinstance(value, list))
        values = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        where = _place(path, node, str(error.full_key or "").split("."))
        message = str(error).splitlines()[0]
        raise BadInput(where, f"{error.full_key}: {message}", "values that can be resolved") from None
    except (ValueError, TypeError) as error:
        raise BadInput(str(path), _one_line(error), "values that can be resolved") from None
    _refuse_secrets(path, node, values)
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise _explain(cls, error, values, path, node, overrides) from None


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to the same settings."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _defaults(cls: type[BaseModel]) -> dict[str, Any]:
    """What interpolations find for sections that the file leaves out, such as `${paths.runs}`."""
    fields = {name: field for name, field in cls.model_fields.items() if not field.is_required()}
    values = {name: field.get_default(call_default_factory=True, validated_data={}) for name, field in fields.items()}
    return {name: value.model_dump() if isinstance(value, BaseModel) else value for name, value in values.items()}


def _refuse_secrets(path: Path, node: yaml.Node, values: Any) -> None:
    """See that no secret of the environment is in the settings (`${oc.env:…}`): they are kept in the run's folder.

    Raises:
        BadInput: one is. It names the variable, and not what it holds.
    """
    secrets = {
        value: name
        for name, value in os.environ.items()
        if names_a_secret(name) and len(value) >= _SHORTEST_SECRET and not value.startswith("/")
    }
    for location, text in _texts(values) if secrets else ():
        for value, name in secrets.items():
            if value in text:
                raise BadInput(
                    _place(path, node, location),
                    f"{'.'.join(location)} holds the value of the environment variable {name}, and settings are kept "
                    "in the run's folder",
                    "the environment alone, or a file with it where a key takes one",
                )


def _texts(values: Any, location: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every string in the settings, with its place."""
    if isinstance(values, str):
        yield location, values
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield from _texts(value, (*location, str(key)))


def _parse_override(override: str) -> tuple[str, Any]:
    """Key and value; interpolations are kept as they are."""
    key, separator, text = override.partition("=")
    if not separator or not key or not all(key.split(".")):
        raise BadInput(f"override '{override}'", "is not an override", "section.key=value")
    try:
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
        return key, parsed["value"]
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        raise BadInput(
            f"override '{override}'", f"cannot be read ({_one_line(error)})", "section.key=value, YAML on the right"
        ) from None


def _explain(
    cls: type[BaseModel], error: ValidationError, values: Any, path: Path, node: yaml.Node, overrides: Sequence[str]
) -> BadInput:
    """One line for the first of pydantic's complaints, unknown keys first (they explain missing ones)."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    location = _as_written(first["loc"], values)
    key = ".".join(location)
    # Where a section's keys contradict each other (value_error), an override of one of them may be the right one.
    starts = (f"{key}=",) if first["type"] == "value_error" else (f"{key}=", f"{key}.")
    override = next((text for text in reversed(overrides) if text.startswith(starts)), None)
    if override and location[-1:] in (("env",), ("engine",), ("url",), ("copy_to",)):
        override = f"{key}=…"  # it may be a secret that is wrong with it
    where = f"override '{override}'" if override else _place(path, node, location)
    others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(cls, location[:-1])
        nearest = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean '{'.'.join((*location[:-1], nearest[0]))}'?" if nearest else f"known: {', '.join(known)}"
        return BadInput(where, f"unknown key '{key}'", hint + others)
    if first["type"] == "missing":
        return BadInput(where, f"'{key}' is missing", _description(cls, location) + others)
    if first["type"] == "value_error":
        message = first["msg"].removeprefix("Value error, ")
        return BadInput(where, f"{key + ': ' if key else ''}{message}", "see docs/settings.md" + others)
    if first["type"] == "model_type":
        return BadInput(where, f"{key} is {first['input']!r}", "a section with keys of its own" + others)
    found = repr(first["input"])
    found = found if len(found) < 80 else found[:77] + "…"
    return BadInput(where, f"{key} is {found}", first["msg"][0].lower() + first["msg"][1:] + others)


def _as_written(location: Sequence[int | str], values: Any) -> tuple[str, ...]:
    """The place in the file's own structure: one section in place of a list of them has no number there."""
    written: list[str] = []
    for part in location:
        if isinstance(part, int) and isinstance(values, dict):
            continue
        written.append(str(part))
        inside = (isinstance(values, dict) and part in values) or (
            isinstance(values, list) and part in range(len(values))
        )
        values = values[part] if inside else None
    return tuple(written)


def _place(path: Path, node: yaml.Node, location: Sequence[str]) -> str:
    """`file:line` of the deepest part of the key that is in the file."""
    line = None
    for part in location:
        if isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
            node = node.value[int(part)]
            line = node.start_mark.line + 1
            continue
        if not isinstance(node, yaml.MappingNode):
            break
        found = next(((key, value) for key, value in node.value if key.value == part), None)
        if found is None:
            break
        line, node = found[0].start_mark.line + 1, found[1]
    return f"{path}:{line}" if line else str(path)


def _section(cls: type[BaseModel], location: Sequence[str]) -> type[BaseModel] | None:
    """The settings class that a key's parents lead to."""
    current: type[BaseModel] | None = cls
    for part in location:
        if part.isdigit():  # in a list of sections
            continue
        if current is None or part not in current.model_fields:
            return None
        annotation = current.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        current = next((item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)), None)
    return current


def _known_keys(cls: type[BaseModel], location: Sequence[str]) -> list[str]:
    section = _section(cls, location)
    return list(section.model_fields) if section else []


def _description(cls: type[BaseModel], location: Sequence[str]) -> str:
    section = _section(cls, location[:-1])
    field = section.model_fields.get(location[-1]) if section else None
    return f"needed: {field.description}" if field and field.description else "it is needed"


def _one_line(error: Any) -> str:
    return " ".join(str(error).split())
