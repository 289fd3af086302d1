"""settings.py: what can be done with the groups of settings of config.py, whatever stands in them.

in : nested dataclasses, flat names and values       out: the same, changed and checked
Every value is checked against the type that its declaration has, bounds included: on the command
line and in files alike (checked.py). Nothing of the paper is here; no setting is known by its name,
so that one more is one declaration.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from config import Config
from envs import get_family
from methods import Method, get_method
from support.checked import validated

# Groups and settings that do not change the weights: a continued run may have others.
FREE_GROUPS = ("play", "work", "run")
FREE = ("datasets",)


def leaves(settings: Any) -> Iterator[tuple[str, str, Any]]:
    """(group, name, value) of every setting; the group is "" at the top."""
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        if is_dataclass(value):
            yield from ((entry.name, name, inner) for _, name, inner in leaves(value))
        else:
            yield "", entry.name, value


def counting(settings: Any, *free_groups: str) -> Iterator[tuple[str, Any]]:
    """(name, value) of every setting that counts: all but those of these groups and of FREE."""
    for group, name, value in leaves(settings):
        if group not in free_groups and name not in FREE:
            yield name, value


def flat(settings: Any) -> dict[str, Any]:
    """{name: value} of every setting; names are unique over the groups."""
    return {name: value for _, name, value in leaves(settings)}


def with_values(settings: Any, values: dict[str, Any]) -> Any:
    """The settings with some of them changed by their flat names, those that they know."""
    changed = {}
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        if is_dataclass(value):  # a group: a name may stand in any of them
            changed[entry.name] = with_values(value, values)
        elif entry.name in values:
            changed[entry.name] = values[entry.name]
    return replace(settings, **changed)


def check_types(settings: Any, where: str = "") -> None:
    """Every value against its declaration. Raises ValueError that names the first wrong one."""
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        if is_dataclass(value):
            check_types(value, where)
    own = {f.name for f in fields(settings) if not is_dataclass(getattr(settings, f.name))}
    values = {k: v for k, v in asdict(settings).items() if k in own}
    validated(type(settings), values, where, flags=True)
    if hasattr(settings, "check"):  # what must hold between the settings of a group
        settings.check()


def groups_of(method: type[Method]) -> dict[str, type]:
    """The groups that a method brings along."""
    return {"method": method.Settings, "model": method.Model, "play": method.Play}


def before(group: type) -> dict[str, Any]:
    """What older runs, which do not have all settings of a group, did (config.py: `before`)."""
    return {f.name: f.metadata["before"] for f in fields(group) if "before" in f.metadata}


def said(settings: Any) -> dict[str, Any]:
    """`asdict` without what is as `before`: a name made of it outlives a setting that is added."""
    old = before(type(settings))
    return {k: v for k, v in asdict(settings).items() if k not in old or v != old[k]}


def short_hash(text: str) -> str:
    """Eight digits that change with the text: what the name of a folder has no room to say."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def all_before(settings: Any) -> dict[str, Any]:
    """`before` of a dataclass and of all groups in it, by the settings' names."""
    found = before(type(settings))
    for entry in fields(settings):
        if is_dataclass(group := getattr(settings, entry.name)):
            found |= all_before(group)
    return found


def _named(holder: dict, name: str, where: str, given: str | None, find: Callable) -> None:
    """Check the family or method that a file of settings names; put the user's own path for it."""
    value = holder.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{where} is damaged: it names no {name}")
    if given and Path(given).name != Path(value).name:  # a folder may have moved
        raise ValueError(f"{where} is of --{name} {value}, not of {given}")
    if not value.endswith(".py"):
        try:
            find(value)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    elif given:
        holder[name] = given
    else:
        raise ValueError(f"{where} names the file {value}: name it yourself (--{name} {value})")


def from_plain(plain: dict, where: str, **files: str | None) -> Config:
    """A Config from what `dataclasses.asdict` made of it and JSON kept.

    `files`: `env` and `backbone` as the user names them, needed where they are Python files: what
    is read from disk never chooses code to run. Raises ValueError with one line.
    """
    other_version = f"{where} is damaged, or of another version: its"
    if set(plain) != {f.name for f in fields(Config)}:
        names = ", ".join(sorted(set(plain) ^ {f.name for f in fields(Config)}))
        raise ValueError(f"{other_version} groups of settings ({names})")
    if not isinstance(plain["data"], dict):
        raise ValueError(f"{other_version} data settings")
    plain = {**plain, "data": dict(plain["data"])}
    _named(plain["data"], "env", where, files.get("env"), get_family)
    _named(plain, "backbone", where, files.get("backbone"), get_method)
    own = groups_of(get_method(plain["backbone"]))  # the method decides what its groups hold
    made = {}
    for entry in fields(Config):
        value = plain[entry.name]
        group = own.get(entry.name)
        if is_dataclass(entry.default_factory):
            group = entry.default_factory
        if group is None:  # a plain value: checked with all the others at the end
            made[entry.name] = value
        elif not isinstance(value, dict):
            raise ValueError(f"{other_version} {entry.name} settings")
        else:
            value = before(group) | value
            # all settings and no others: a default that has changed since must not slip in
            if set(value) != {f.name for f in fields(group)}:
                raise ValueError(f"{other_version} {entry.name} settings")
            made[entry.name] = validated(group, value, f"{where}: ", flags=True)
    cfg = Config(**made)
    check_types(cfg, f"{where}: ")
    return cfg
