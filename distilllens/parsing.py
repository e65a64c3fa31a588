"""From a command line to a configuration dataclass: YAML layers, flags over them, refusals."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    NoReturn,
    TypeVar,
    get_args,
    get_type_hints,
)

import yaml
from jsonargparse import ArgumentParser, set_loader, set_parsing_settings

from distilllens.errors import ConfigError
from distilllens.plain_yaml import RefusedYamlError, load_plain_yaml
from distilllens.ranges import describe_type, field_ranges, field_types, parts, range_problem

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

LARGEST_FILE = 1_000_000
"""Bytes of a YAML layer; ours have a few thousand."""
LONGEST_MESSAGE = 400
"""Characters of what the parser says about one value: it quotes the value whole."""


set_loader("plain_yaml", load_plain_yaml, exceptions=(yaml.YAMLError,))


# --- Command lines ------------------------------------------------------------------------------


class CommandParser(argparse.ArgumentParser):
    """Plain flags, of the commands without a configuration; wrong usage is a `ConfigError`."""

    def error(self, message: str) -> NoReturn:
        """Raises instead of ending the process."""
        raise ConfigError(message, fix=f"{self.prog} --help")


def parse_arguments(
    config_class: type[T], argv: Sequence[str] | None, *, prog: str, about: str = ""
) -> T:
    """Parses ``argv`` into ``config_class``, every value within its option's range.

    Args:
        config_class: Of all options.
        argv: Arguments; None: those of the process.
        prog: How the program is called, as it can be copied.
        about: What it does, for ``--help``; default: the first line of the class's docstring.

    Raises:
        ConfigError: Unknown keys, all at once; a value of a wrong type; all that are out of range,
            not finite, beyond 64 bits, or with control characters; a file that is missing, not
            YAML, or more than plain YAML.
    """
    parser = build_parser(config_class, prog=prog, about=about)
    arguments = _spell_out_switches(sys.argv[1:] if argv is None else argv)
    layers, refused = _read_layers(arguments)
    unknown = [*_layer_problems(parser, layers), *_flag_problems(parser, arguments)]
    raise_problems([*refused, *unknown], fix=EVERY_KEY if unknown else "")
    try:
        namespace = parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        raise _wrong_value(_one_line(str(error)), field_types(config_class), prog) from None
    values = vars(parser.instantiate(namespace))
    config = config_class(**{f.name: values[f.name] for f in dataclasses.fields(config_class)})
    raise_problems(list(_value_problems(config)))
    return config


@cache
def build_parser(config_class: type, *, prog: str, about: str = "") -> ArgumentParser:
    """Returns the parser of a configuration class; its field docstrings are the help texts.

    Made once: it costs twice as much as a parse, and a sweep parses once for each method.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog,
        usage="%(prog)s [--config FILE …] [--KEY VALUE …]",
        exit_on_error=False,
        default_env=False,
        parser_mode="plain_yaml",
    )
    parser.add_argument("--config", action="config", help="YAML file; may be given several times")
    parser.add_class_arguments(config_class, as_group=True)
    _tell_program(parser, config_class, about)
    types, ranges = field_types(config_class), field_ranges(config_class)
    for action in parser._actions:
        if told := ranges.get(action.dest):
            action.help = f"{action.help} Range: {told}."
        elif action.dest not in ("help", "config", "print_config", *types):
            action.help = argparse.SUPPRESS  # the library's own
        for part in parts(types.get(action.dest)):
            if part is types[action.dest]:
                action.help = argparse.SUPPRESS  # a section: its keys stand below
            else:
                action.help = f"{action.help} {_tell_keys(part, action.dest)}"
    return parser


def _tell_program(parser: ArgumentParser, config_class: type, about: str) -> None:
    """Puts what the program does on top; the keys without a section had it as their title."""
    title = (config_class.__doc__ or "").partition("\n")[0].removesuffix(".")
    parser.description = about or f"{title}."
    for group in parser._action_groups:
        if group.title == title:
            group.title = "without a section"


def _tell_keys(part: type, section: str) -> str:
    """Returns what the keys of an optional section mean: the library shows its name alone."""
    actions = build_parser(part, prog="")._actions
    keys = [action for action in actions if action.dest in field_types(part)]
    return " ".join(f"--{section}.{k.dest}: {k.help} Default: {k.default}." for k in keys)


SWITCHES = ("dry_run", "debug", "overwrite", "download", "token_metrics", "exposure_bias")
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


def did_you_mean(key: str, known: set[str], *, before: str = "") -> str:
    """Returns a hint at the nearest known key: first as a whole, then by its last part.

    Args:
        key: As it was given.
        known: All keys.
        before: What stands before a key where it can be copied, as -- or a folder.
    """
    last_parts = {k.rsplit(".", 1)[-1]: k for k in sorted(known, reverse=True)}
    whole = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    last = difflib.get_close_matches(key.rsplit(".", 1)[-1], last_parts, n=1, cutoff=0.75)
    guess = whole[0] if whole else (last_parts[last[0]] if last else "")
    return f" (did you mean {before}{guess}?)" if guess else ""


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in mapping.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{path}.")
        else:
            yield path


def scalars(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every dotted key whose value is no mapping."""
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _config_paths(argv: Sequence[str]) -> Iterator[Path]:
    for position, argument in enumerate(argv):
        if argument == "--config" and position + 1 < len(argv):
            yield Path(argv[position + 1])
        elif argument.startswith("--config="):
            yield Path(argument.removeprefix("--config="))


def _read_layers(argv: Sequence[str]) -> tuple[dict[Path, Mapping[str, Any]], list[str]]:
    """Returns the content of each ``--config`` file, and what is wrong with those not read."""
    layers: dict[Path, Mapping[str, Any]] = {}
    refused = []
    for path in _config_paths(argv):
        try:
            layers[path] = read_mapping(path)
        except ConfigError as error:
            refused.append(error.what)
    return layers, refused


def _layer_problems(
    parser: ArgumentParser, layers: Mapping[Path, Mapping[str, Any]]
) -> Iterator[str]:
    known = _known_keys(parser)
    sections = {key.rpartition(".")[0] for key in known if "." in key}
    optional = _optional_keys(parser)
    for path, content in layers.items():
        for key in _flatten(content):
            if key not in known:
                yield f"{path}: unknown key {key}{did_you_mean(key, known)}"
        for section, value in scalars(content):
            if section in sections and not (value is None and section in optional):
                yield f"{path}: {section} must be a mapping of keys, got {value!r:.40}"


def read_mapping(path: Path) -> Mapping[str, Any]:
    """Returns the mapping that a YAML file holds, read by `load_plain_yaml`.

    Raises:
        ConfigError: It is not there, not readable, not YAML, more than plain YAML, or no mapping.
    """
    try:
        content = load_plain_yaml(_read_layer(path))
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_problem(path, error)) from None
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path}: expected a mapping of sections, got {content!r:.60}")
    return content


def _read_layer(path: Path) -> str:
    """Returns the text of a YAML file.

    Raises:
        ConfigError: It is not there, not readable, far too large, or not UTF-8.
    """
    try:
        if not path.is_file():
            raise ConfigError(f"--config {path}: no such file{_near_file(path)}")
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise ConfigError(f"--config {path}: {size:,} bytes are no configuration")
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--config {str(path)[:80]}: {error.strerror}") from None
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: not YAML: invalid UTF-8 (0x{content[error.start]:02x})"
        ) from None


def _near_file(path: Path) -> str:
    """Returns a hint at the file of its folder with the nearest name."""
    folder = path.parent
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    return did_you_mean(path.name, names, before="" if folder == Path() else f"{folder}/")


def _yaml_problem(path: Path, error: yaml.YAMLError) -> str:
    """Says what is wrong in a file, and where."""
    mark = getattr(error, "problem_mark", None)
    where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark is not None else f"{path}"
    told = _one_line(getattr(error, "problem", None) or str(error))
    return (
        f"{where}: {told}" if isinstance(error, RefusedYamlError) else f"{where}: not YAML: {told}"
    )


def _optional_keys(parser: ArgumentParser) -> set[str]:
    """Returns the keys that may be null."""
    hints = {a.dest: get_args(getattr(a, "_typehint", None)) for a in parser._actions}
    return {key for key, parts in hints.items() if type(None) in parts}


def _flag_problems(parser: ArgumentParser, argv: Sequence[str]) -> Iterator[str]:
    known = _known_keys(parser)
    sections = {key.rpartition(".")[0] for key in known if "." in key} - _optional_keys(parser)
    for argument in argv:
        key = argument.removeprefix("--").partition("=")[0].removesuffix("+")
        if not argument.startswith("--"):
            continue
        if key in sections:  # the library would read a file there
            yield f"--{key} is a section: give its keys, as --{key}.KEY, or a file with --config"
        elif key not in known | {"help", "print_config", "config"}:
            yield f"unknown flag --{key}{did_you_mean(key, known, before='--')}"


def _value_problems(config: Any, prefix: str = "") -> Iterator[str]:
    """Yields every value that is out of its option's range, or that no option can have."""
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        key, value = f"{prefix}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _value_problems(value, f"{key}.")
        elif value is None and type(None) not in get_args(hints[field.name]):
            yield f"{key} must have a value, got null"
        else:
            for item in value if isinstance(value, list) else [value]:
                if problem := _item_problem(item) or range_problem(hints[field.name], item):
                    yield f"{key}={value!r:.80} {problem}"


def _item_problem(value: Any) -> str:
    """Says what is wrong with one value; empty if nothing is."""
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if isinstance(value, int) and abs(value) >= 2**63:
        return "must fit into 64 bits"
    if value == "":
        return "must not be empty; null stands for none"
    if isinstance(value, str) and re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", value):
        return "must not hold control characters or broken Unicode"
    return ""


def _wrong_value(told: str, types: Mapping[str, Any], prog: str) -> ConfigError:
    """Says in the option's own terms what the parser says about a value of a wrong type."""
    keys = re.findall(r'Parser key "([^"]+)"', told)
    key = ".".join(keys) if ".".join(keys) in types else "".join(keys[:1])
    values = re.findall(r"(?:Got|Given) value: (.*?)(?= - Expected|$)", told)
    if key not in types or not values:
        return ConfigError(told[:LONGEST_MESSAGE], fix=f"{prog} --help")
    value, name = f"{values[0]:.80}", key.rpartition(".")[2]
    fix = f"{prog} --help"
    if "Expected a <class 'list'>" in told:
        fix = f"a list stands in brackets: --{key} '[{value}]', or {name}: [{value}] in YAML"
    elif str in (types[key], *get_args(types[key])):
        fix = f"quote it in YAML, as in {name}: '…'"
    return ConfigError(f"{key} must be {describe_type(types[key])}, got {value}", fix=fix)


def _one_line(text: str) -> str:
    return _printable(re.sub(r"\s+", " ", text).strip())


def _printable(text: str) -> str:
    """Shows control characters and broken Unicode, which keys and flags may hold, as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


EVERY_KEY = "--help lists every key with its meaning and default"


def raise_problems(problems: Sequence[str], *, fix: str = EVERY_KEY) -> None:
    """Raises one ConfigError that tells all problems; does nothing if there are none."""
    if not problems:
        return
    count = len(problems)
    what = problems[0] if count == 1 else f"{count} problems: {'; '.join(problems)}"
    raise ConfigError(_printable(what), fix=fix)
