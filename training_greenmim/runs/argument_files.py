# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Arguments in a .yaml or .json file: read strictly, each value of the type that its argument has."""

import json
import types
from collections.abc import Iterable
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml


SUFFIXES = (".json", ".yaml", ".yml")

_TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text (in quotes)",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}


def read_argument_file(path: str, dataclass_types: Iterable[type]) -> dict[str, Any]:
    """Values of a .yaml or .json file, as arguments of the dataclasses.

    Raises:
        `ValueError`: for a file that cannot be read or is not valid, keys given twice or unknown, and values of a
            wrong type; it names the file and the key.
    """
    types_of_arguments = {
        name: hint
        for dataclass_type in dataclass_types
        for name, hint in get_type_hints(dataclass_type).items()
        if name in {field.name for field in fields(dataclass_type) if field.init}
    }
    values = _read_mapping(path)
    unknown = sorted(set(map(str, values)) - set(types_of_arguments))
    if unknown:
        raise ValueError(f"{path} sets {unknown}, which are no arguments of this script.")
    return {name: _converted(path, name, value, types_of_arguments[name]) for name, value in values.items()}


def parse_yaml(text: str) -> Any:
    """YAML as data, in which no key may be given twice.

    Raises:
        `yaml.YAMLError`: for other text.
    """
    return yaml.load(text, _StrictLoader)


class _StrictLoader(yaml.SafeLoader):
    """YAML's own rule, which PyYAML does not keep: the keys of a mapping differ."""


def _construct_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for index, key in enumerate(keys):
        if key in keys[:index]:
            raise yaml.constructor.ConstructorError(
                None, None, f"`{key}` is given twice", node.value[index][0].start_mark
            )
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"`{name}` is given twice")
    return dict(pairs)


def _read_mapping(path: str) -> dict:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file of arguments.") from None
    except OSError as error:
        raise ValueError(f"{path}: this file of arguments cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: this file of arguments is no text in UTF-8.") from error
    try:
        values = json.loads(text, object_pairs_hook=_unique) if path.endswith(".json") else parse_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {describe_yaml_error(error)}.") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        found = _TYPE_NAMES.get(type(values), repr(values))
        raise ValueError(f"{path} holds {found}; lines of `argument: value` are needed.")
    return values


def describe_yaml_error(error: yaml.YAMLError) -> str:
    """What is wrong with YAML, and where, in one line."""
    mark = getattr(error, "problem_mark", None)
    line = f"line {mark.line + 1}: " if mark is not None else ""
    return line + (getattr(error, "problem", None) or str(error).splitlines()[0])


def _converted(path: str, name: str, value: Any, hint: Any) -> Any:
    """A value as its argument's type.

    Raises:
        `ValueError`: naming file, key, value and what it should be.
    """
    if name == "resume_from_checkpoint" and isinstance(value, bool):
        return str(value).lower()  # a flag can only be text: the checkpoint's name, or true for the last one
    for accepted in _members(hint):
        try:
            return _as_type(value, accepted)
        except (TypeError, ValueError):
            continue
    wanted = " or ".join(dict.fromkeys(map(_type_name, _members(hint))))
    raise ValueError(f"{path}: `{name}` is {value!r}; {wanted} is needed.")


def _members(hint: Any) -> list:
    """The types that an argument may have; where there are named choices, text is none of them."""
    members = list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
    return [member for member in members if member is not str or not any(map(_is_enum, members))]


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


def _as_type(value: Any, hint: Any) -> Any:
    """A value as one type.

    Raises:
        `TypeError`, `ValueError`: when it is of another.
    """
    origin = get_origin(hint) or hint
    if origin is Any:
        return value
    if origin is Literal:
        return get_args(hint)[get_args(hint).index(value)]
    if _is_enum(origin):
        return origin("no" if value is False else value).value  # YAML takes a bare no for false
    if origin is list:
        (element,) = get_args(hint) or (Any,)
        return [_as_type(part, element) for part in _instance(value, list)]
    if origin is bool and isinstance(value, str):
        return [False, True][["false", "true"].index(value.lower())]
    if origin is float and not isinstance(value, bool):
        return float(_instance(value, int | float | str))  # YAML takes 1e-5, without a point, for text
    if origin is int and isinstance(value, bool):
        raise TypeError
    return _instance(value, origin)


def _instance(value: Any, accepted: type) -> Any:
    if not isinstance(value, accepted):
        raise TypeError
    return value


def _type_name(hint: Any) -> str:
    origin = get_origin(hint) or hint
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if _is_enum(origin):
        return "one of " + ", ".join(str(member.value) for member in origin)
    return _TYPE_NAMES.get(origin, str(origin))
