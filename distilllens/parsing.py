"""From a command line to a configuration dataclass: YAML layers, flags over them, refusals."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from distilllens.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def parse_arguments(config_class: type[T], argv: Sequence[str] | None, *, prog: str) -> T:
    """Parses ``argv`` into ``config_class`` without checking ranges."""
    parser = build_parser(config_class, prog=prog)
    arguments = _spell_out_switches(sys.argv[1:] if argv is None else argv)
    raise_problems([*_yaml_problems(parser, arguments), *_flag_problems(parser, arguments)])
    try:
        namespace = parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(_one_line(str(error)), fix=f"python {prog} --help") from None
    values = vars(parser.instantiate(namespace))
    return config_class(**{f.name: values[f.name] for f in dataclasses.fields(config_class)})


def build_parser(config_class: type, *, prog: str) -> ArgumentParser:
    """Returns the parser of a configuration class; its field docstrings are the help texts."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=prog, exit_on_error=False, default_env=False)
    parser.add_argument("--config", action="config", help="YAML file; may be given several times")
    parser.add_class_arguments(config_class, as_group=True)
    return parser


SWITCHES = ("dry_run", "debug", "overwrite", "download")
"""Booleans that may stand without a value."""


def _spell_out_switches(argv: Sequence[str]) -> list[str]:
    """``--dry_run`` alone becomes ``--dry_run=true``."""
    arguments: list[str] = []
    for position, argument in enumerate(argv):
        following = argv[position + 1] if position + 1 < len(argv) else ""
        if argument.removeprefix("--") in SWITCHES and following.lower() not in ("true", "false"):
            argument += "=true"
        arguments.append(argument)
    return arguments


def _known_keys(parser: ArgumentParser) -> set[str]:
    """Returns every dotted key; an optional dataclass brings the keys of its fields."""
    keys = set()
    for action in parser._actions:
        if action.option_strings:
            keys.add(action.dest)
            for part in get_args(getattr(action, "_typehint", None)):
                if dataclasses.is_dataclass(part):
                    keys |= {f"{action.dest}.{f.name}" for f in dataclasses.fields(part)}
    return keys


def _did_you_mean(key: str, known: set[str]) -> str:
    """Returns the nearest known key: first by its last part, then as a whole."""
    last_parts = {k.rsplit(".", 1)[-1]: k for k in sorted(known, reverse=True)}
    whole = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    last = difflib.get_close_matches(key.rsplit(".", 1)[-1], last_parts, n=1, cutoff=0.75)
    guess = whole[0] if whole else (last_parts[last[0]] if last else "")
    return f" (did you mean {guess}?)" if guess else ""


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in mapping.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{path}.")
        else:
            yield path


def _config_paths(argv: Sequence[str]) -> Iterator[Path]:
    for position, argument in enumerate(argv):
        if argument == "--config" and position + 1 < len(argv):
            yield Path(argv[position + 1])
        elif argument.startswith("--config="):
            yield Path(argument.removeprefix("--config="))


def _yaml_problems(parser: ArgumentParser, argv: Sequence[str]) -> list[str]:
    known = _known_keys(parser)
    sections = {key.rpartition(".")[0] for key in known if "." in key}
    optional = _optional_keys(parser)
    problems = []
    for path in _config_paths(argv):
        if not path.is_file():
            problems.append(f"--config {path}: no such file")
            continue
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            problems.append(f"{path}: not YAML: {_one_line(str(error))}")
            continue
        if not isinstance(content, Mapping):
            problems.append(f"{path}: expected a mapping of sections, got {content!r:.60}")
            continue
        problems += [
            f"{path}: unknown key {key}{_did_you_mean(key, known)}"
            for key in _flatten(content)
            if key not in known
        ]
        problems += [
            f"{path}: {section} must be a mapping of keys, got {value!r:.40}"
            for section, value in _scalars(content)
            if section in sections and not (value is None and section in optional)
        ]
    return problems


def _optional_keys(parser: ArgumentParser) -> set[str]:
    """Returns the keys that may be null."""
    hints = {a.dest: get_args(getattr(a, "_typehint", None)) for a in parser._actions}
    return {key for key, parts in hints.items() if type(None) in parts}


def _scalars(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every dotted key whose value is no mapping."""
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _flag_problems(parser: ArgumentParser, argv: Sequence[str]) -> list[str]:
    known = _known_keys(parser)
    extra = {"help", "print_config", "config"}
    problems = []
    for argument in argv:
        if not argument.startswith("--"):
            continue
        key = argument[2:].split("=", 1)[0].removesuffix("+")
        if key not in known | extra and not key.endswith(".help"):
            problems.append(f"unknown flag --{key}{_did_you_mean(key, known)}")
    return problems


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def raise_problems(problems: Sequence[str]) -> None:
    """Raises one ConfigError that tells all problems; does nothing if there are none."""
    if not problems:
        return
    count = len(problems)
    what = problems[0] if count == 1 else f"{count} problems: {'; '.join(problems)}"
    raise ConfigError(what, fix="--help lists every key with its meaning and default")
