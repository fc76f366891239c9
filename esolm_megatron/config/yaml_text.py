"""YAML as this package reads it, from files and from the right side of `field=value`: strict where YAML is silent."""

from __future__ import annotations

import types
from collections.abc import Hashable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from esolm_megatron.errors import ConfigError, shown

MOST_EXPANDED = 1 << 20
"""Characters that a document may have once its aliases are written out."""


def parse(text: str, name: str) -> Any:
    """What a YAML document says.

    Raises:
        ConfigError: it is not YAML, a mapping has one key twice, or its aliases make it larger than 1 MB; `name` heads it.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        size = _expanded(node, {})
        if size > MOST_EXPANDED:
            raise ConfigError(
                f"{name}: is {size:,} characters with its aliases written out; {MOST_EXPANDED:,} are allowed"
            )
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not YAML: {error}") from error
    except _Twice as error:
        raise ConfigError(f"{name}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{name}: an alias holds itself, or lists lie too deep") from None
    finally:
        loader.dispose()


def read_mapping(path: Path, of: str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: as `parse`, or the file cannot be read or holds no mapping `of` what is said.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    tree = parse(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of {of}, found {type(tree).__name__}")
    return tree


def value_of(word: str, kind: type[BaseModel]) -> Any:
    """What the right side of `section.field=value` means for `kind`: text is taken as it stands, all else is YAML.

    Raises:
        ConfigError: it is not YAML, or ` #` would begin a comment.
    """
    name, _, value = word.partition("=")
    annotation = _annotation(kind, name.split("."))
    listed = value.startswith("[") and not is_text(annotation)
    if is_text(annotation, or_list=True) and value != "null" and not listed:
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
        return parse(value, shown(word)) if quoted else value
    if " #" in value and not any(mark in value for mark in "'\""):
        raise ConfigError(f"{shown(word)}: ' #' begins a comment in YAML; write the value in quotes")
    return parse(value, shown(word))


def is_text(annotation: Any, *, or_list: bool = False) -> bool:
    """Whether a field holds text, or one of some words, and nothing else but perhaps null; or_list: or a list of texts."""
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [x for x in get_args(annotation) if x is not type(None) and not (or_list and get_origin(x) is tuple)]
        return bool(kinds) and all(map(is_text, kinds))
    if get_origin(annotation) is Literal:
        return all(isinstance(x, str) for x in get_args(annotation))
    return annotation in (str, Path)


def _annotation(kind: Any, path: list[str]) -> Any:
    for part in path:
        if get_origin(kind) is dict:  # any name, then what it stands for
            kind = get_args(kind)[1]
            continue
        field = kind.model_fields.get(part) if isinstance(kind, type) and issubclass(kind, BaseModel) else None
        kind = None if field is None else field.annotation
    return kind


class _Twice(Exception):
    """A mapping has a key twice."""


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise _Twice(
                    f"{shown(key.value)} stands in line {seen[key.value]} and again in line {line}; remove one"
                )
            seen[key.value] = line
        return super().construct_mapping(node, deep)


def _expanded(node: Node, known: dict[int, int]) -> int:
    """Characters of a node with its aliases written out."""
    if id(node) not in known:
        size = len(node.value) + 1
        if isinstance(node, SequenceNode):
            size = sum(_expanded(x, known) for x in node.value) + 2
        elif isinstance(node, MappingNode):
            size = sum(_expanded(x, known) for pair in node.value for x in pair) + 2
        known[id(node)] = size
    return known[id(node)]
