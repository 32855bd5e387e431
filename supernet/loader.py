"""Configurations from YAML files and `key=value` overrides.

Whatever is wrong becomes one sentence that names the key, what it got and what it takes.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from .errors import ConfigError

ConfigType = TypeVar("ConfigType", bound=BaseModel)


def load_config(
    path: str | Path | None, overrides: Sequence[str], kind: type[ConfigType]
) -> ConfigType:
    """Read a YAML file, apply `dotted.key=value` overrides (values are YAML), validate as `kind`.

    Raises ConfigError, one sentence for each wrong key.
    """
    values = read_values(path)
    for override in overrides:
        apply_override(values, override)
    return validate(values, kind)


def read_values(path: str | Path | None) -> dict[str, Any]:
    """A YAML file's mapping; empty where there is no file to read."""
    if path is None:
        return {}
    try:
        text = Path(path).read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 at byte {error.start}") from error
    values = parse(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} takes a mapping of keys to values")
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"an override takes the form key=value, got {override!r}")
    *path, last = key.split(".")
    for part in path:
        inner = values.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{key} goes inside {part}, which is {inner!r}")
        values = inner
    values[last] = parse(text, f"{key}={text}")


def parse(text: str, what: str) -> Any:
    """The value of a YAML text; `what` says in an error where it stands."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that no calendar has
        raise ConfigError(f"{what} is not YAML: {' '.join(str(error).split())}") from error


def validate(values: Mapping[str, Any], kind: type[ConfigType]) -> ConfigType:
    """Check values as a `kind`. Raises ConfigError, one sentence for each wrong key."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(sentences(error, values))) from error


def sentences(error: ValidationError, values: Mapping[str, Any]) -> list[str]:
    """Pydantic's findings as one `key: what is wrong, got value` for each key.

    A union gives a finding for each of its members. Those of one key become one sentence, and where
    a member came further into the value than another, its finding alone is told.
    """
    findings: dict[tuple[str, ...], list[Any]] = {}
    for detail in error.errors():
        findings.setdefault(key_of(detail, values), []).append(detail)
    return [
        sentence(".".join(key), details)
        for key, details in findings.items()
        if not any(other[: len(key)] == key for other in findings if len(other) > len(key))
    ]


def key_of(detail: Any, values: Any) -> tuple[str, ...]:
    """A finding's location without the members of unions, which are no keys of the file."""
    key: list[str] = []
    for part in detail["loc"]:
        is_key = part in values if isinstance(values, Mapping) else isinstance(part, int)
        if is_key and isinstance(values, Mapping | list | tuple):
            key.append(str(part))
            values = values[part]
    if detail["type"] == "missing":
        key.append(str(detail["loc"][-1]))
    if detail["type"].startswith("union_tag"):
        key.append(detail["ctx"]["discriminator"].strip("'"))
    return tuple(key)


def sentence(key: str, details: Sequence[Any]) -> str:
    """What is wrong with one key."""
    first = details[0]
    prefix = f"{key}: " if key else ""
    if first["type"] == "value_error":
        return prefix + first["msg"].removeprefix("Value error, ")
    if first["type"] in ("missing", "union_tag_not_found"):
        return f"{prefix}is required"
    if first["type"] == "union_tag_invalid":
        context = first["ctx"]
        return f"{prefix}takes one of {context['expected_tags']}, got {context['tag']!r}"
    if first["type"] == "extra_forbidden":
        return f"{prefix}is not a known key"
    messages = [in_plain_words(detail["msg"].partition(", unable to")[0]) for detail in details]
    others = dict.fromkeys(message.removeprefix("Input should be ") for message in messages[1:])
    wrong = " or ".join((messages[0][0].lower() + messages[0][1:], *others))
    return f"{prefix}{wrong}, got {first['input']!r}"


# What pydantic calls values by the types that Python keeps them in
PLAIN = {
    r"a valid (tuple|list)": "a list",
    r"a valid dictionary( or (instance|object) .*)?": "keys and values",
    r"is not a valid path.*": "should be a path",
}


def in_plain_words(message: str) -> str:
    for theirs, ours in PLAIN.items():
        message = re.sub(theirs, ours, message)
    return message


def describe(
    kind: type[BaseModel], prefix: str = "", places: dict[type[BaseModel], str] | None = None
) -> Iterator[str]:
    """One line for each key that a configuration takes: its name, default and meaning.

    places: the configurations that were described before, and where; those get a single line.
    """
    places = {} if places is None else places
    for name, field in kind.model_fields.items():
        key = prefix + name
        inner = list(configurations_in(field.annotation))
        for config in inner:
            place = f"{key}.NAME." if get_origin(field.annotation) is dict else f"{key}."
            if config in places:
                of_type = config.model_fields.get("type")
                note = "" if of_type is None else f", with type {get_args(of_type.annotation)[0]}"
                yield f"{place}*: as {places[config]}*{note}"
            else:
                places[config] = place
                yield from describe(config, place, places)
        if not inner:
            default = "required" if field.is_required() else in_yaml(field.default)
            choices = [value for value in get_args(field.annotation) if isinstance(value, str)]
            if len(choices) == 1:
                default = choices[0]
            about = [" | ".join(choices)] if len(choices) > 1 else []
            about += [field.description] if field.description else []
            yield f"{key}: {default}" + (f"  ({'; '.join(about)})" if about else "")


def in_yaml(value: Any) -> str:
    """A default as one would write it."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def configurations_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The configurations among the members of a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for member in get_args(annotation):
        yield from configurations_in(member)
