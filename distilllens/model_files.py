"""What a model folder may hold: looked at before any library acts on it.

Model folders come from strangers. Code of their own, pickles and sizes that no model has are
refused, and nothing of them runs.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from distilllens.errors import ConfigError
from distilllens.runtime import distributed

HUB_TIMEOUT_S = 5.0
LARGEST_SETTINGS = 10_000_000
"""Bytes of a config.json; the largest have some 100,000, most of it names of labels."""
DEEPEST_SETTINGS = 30
"""Levels of nesting in it."""
COUNTS = re.compile(r"(layers?|labels|experts|blocks)$")
"""Names of numbers of parts, of which a library makes an object each: 10⁹ fill the memory."""
MOST_PARTS = 2_000
LARGEST_SIZES = {
    "num_hidden_layers": MOST_PARTS,
    "hidden_size": 1_000_000,
    "vocab_size": 10_000_000,
}
LONGEST_REASON = 300
FOLDERS = {
    "model": "config.json, tokenizer files and model.safetensors",
    "adapter": "adapter_config.json and adapter_model.safetensors",
    "sentence model": "modules.json and the folders that it names",
}
"""What each kind of folder holds."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def check_source(
    path: str,
    must_hold: str,
    revision: str | None = None,
    *,
    kind: Literal["model", "sentence model"] = "model",
    option: str = "",
) -> bool:
    """Returns whether to stay off the network: for folders, and while the hub cannot be reached.

    One quick request decides; the libraries themselves would retry for a minute.

    Raises:
        ConfigError: `check_folder`; or the hub says that there is no such repository.
    """
    check_folder(path, must_hold, kind=kind, option=option)
    if Path(path).is_dir():
        return True
    try:
        HfApi().model_info(path, revision=revision, timeout=HUB_TIMEOUT_S)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise unloadable(path, error) from None
    except Exception:  # no connection, by whatever transport: what is in the cache still loads
        return True
    return False


def check_folder(
    path: str,
    must_hold: str,
    *,
    kind: Literal["model", "adapter", "sentence model"] = "model",
    option: str = "",
    may_be_hub_name: bool = True,
) -> None:
    """Refuses at once what is meant as a local folder and is not one.

    Args:
        path: The folder, or the name of a hub repository.
        must_hold: Name of a file.
        kind: A key of `FOLDERS`.
        option: By which the user gave the path, as ``--model.student``; for the advice.
        may_be_hub_name: Leave alone what is no folder and can be the name of a hub repository.

    Raises:
        ConfigError: It is not there, is a file, lacks the file, or begins with ``~``.
    """
    other = f"another {option}" if option else "another path"
    if path.startswith("~"):
        full = os.path.expanduser(path)[:200]
        raise ConfigError(
            f"{kind} folder {path[:100]} not found",
            why="~ is read by a shell alone, and there at the beginning of a word",
            fix=f"give {option or 'the path'} in full" + (f", {full}" if full != path else ""),
        )
    folder = Path(path)
    try:
        is_folder, is_there = folder.is_dir(), folder.exists()
    except OSError as error:  # too long a name
        raise ConfigError(f"{kind} folder {path[:100]} not found", why=str(error)[:100]) from None
    if is_folder:
        if not (folder / must_hold).is_file():
            raise _lacking(folder, must_hold, kind, option)
        return
    if is_there:
        raise ConfigError(f"{path} is a file, not a {kind} folder", fix=f"give {other}")
    looks_local = path.startswith((".", "/")) or folder.parent.is_dir() or path.count("/") > 1
    if looks_local or not may_be_hub_name:
        how = " (checkpoints/README.md says how)" if kind == "model" else ""
        raise ConfigError(
            f"{kind} folder {path} not found",
            fix=f"put a Hugging Face {kind} folder there{how}, or give {other}",
        )


def _lacking(folder: Path, must_hold: str, kind: str, option: str) -> ConfigError:
    """Returns what to say of a folder without a file, above all of a run's own folder."""
    what = f"{folder} holds no {must_hold}"
    for model in (folder / "best", folder / "latest"):
        if (model / must_hold).is_file():
            return ConfigError(
                what,
                why=f"it is the folder of a run, which has its model in {model.name}/",
                fix=f"give {option or 'the path'} {model}",
            )
    return ConfigError(
        what,
        why=f"a {kind} folder has {FOLDERS[kind]}",
        fix=f"put {must_hold} there, or give another {option or 'path'}",
    )


def check_adapter(path: str, option: str) -> None:
    """Refuses adapters that are not there, are pickled, or name a module to import.

    Args:
        path: Of a local folder.
        option: By which the user gave it.

    Raises:
        ConfigError: It is such a one.
    """
    check = functools.partial(
        check_folder, path, kind="adapter", option=option, may_be_hub_name=False
    )
    check("adapter_config.json")
    check_weights(path)
    check("adapter_model.safetensors")  # else the library takes adapter_model.bin
    settings = check_settings(path, "adapter_config.json", trust_remote_code=False)
    if settings.get("megatron_config") is not None:
        raise ConfigError(f"cannot load {path}", why="megatron_config names a module to import")


def check_weights(path: str) -> None:
    """Refuses a folder whose weights are pickles: loading one can run any code."""
    folder = Path(path)
    names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise ConfigError(
            f"cannot load {path}",
            why=f"{pickles[0]} is a pickle, which could run code; only safetensors are read",
            fix="if you trust where it comes from, load it with transformers on a machine that "
            "may be lost and write it again with save_pretrained, which makes safetensors",
        )


def check_amount(path: str, config: PretrainedConfig, *, trust_remote_code: bool) -> None:
    """Refuses a config.json that asks for far more weights than the folder's files can hold.

    A library would make the lacking ones at random before it tells, and be killed for memory.
    """
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:  # a hub name, or nothing to load: the library says so
        return
    try:
        for file in files:
            with safe_open(file, framework="pt"):  # reads the header, which may be broken
                pass
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a library stumbles over in a stranger's file
        raise unloadable(path, error) from None
    stored = sum(file.stat().st_size for file in files)
    wanted = sum(parameter.numel() for parameter in model.parameters())
    if wanted / 2 > stored:  # half a byte: 4 bits are the fewest that a weight is stored in
        raise ConfigError(
            f"cannot load {path}",
            why=f"config.json asks for {wanted:,} weights, the files hold {stored:,} bytes",
        )


def check_settings(path: str, name: str, *, trust_remote_code: bool) -> dict[str, Any]:
    """Reads a JSON file of a model folder and refuses what would harm; of a hub name: nothing.

    Raises:
        ConfigError: Not a JSON object; nested too deeply, numbers that no model has; code of the
            folder's own or of a hub repository, unless it is trusted, or transformers knows the
            family itself: then its own class is loaded, and the code is told of and left alone.
    """
    file = Path(path) / name
    if not file.is_file():
        return {}
    try:
        if file.stat().st_size > LARGEST_SETTINGS:
            raise ValueError(f"{file.stat().st_size:,} bytes are no {name}")
        settings = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it is no JSON object")
        for key, value in _nested(settings):
            _check_setting(key, value)
    except RecursionError:
        raise ConfigError(f"cannot load {path}", why=f"{name} is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load {path}", why=f"{name}: {first_line(error)}") from None
    if trust_remote_code:
        return settings
    native = _native_class(name, settings)
    ignored = settings.pop("auto_map", None) if native else None
    if code := _foreign_code(settings):
        raise ConfigError(
            f"cannot load {path}",
            why=f"{name} asks to run Python code: {code}; nothing of it ran",
            fix="if the library knows the family itself, delete that entry; else read the code, "
            "then --model.trust_remote_code true --model.revision COMMIT",
        )
    if ignored:
        _tell_ignored(str(file), native)
    return settings


def _native_class(name: str, settings: dict[str, Any]) -> str:
    """Returns what transformers itself makes of a folder whose ``auto_map`` is ignored, or ""."""
    if not isinstance(settings.get("auto_map"), dict):
        return ""
    key = "model_type" if name == "config.json" else "tokenizer_class"
    value = settings.get(key)
    if not isinstance(value, str):
        return ""
    if name == "config.json":
        return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(value, ""))
    known = name == "tokenizer_config.json" and tokenizer_class_from_name(value) is not None
    return value if known else ""


@functools.cache
def _tell_ignored(file: str, native: str) -> None:
    """Warns once a process, on the screen of the first."""
    if distributed.is_main():
        print(
            f"warning: {file}: auto_map is ignored and its code does not run; "
            f"loading transformers' own {native}",
            file=sys.stderr,
        )


def _foreign_code(settings: dict[str, Any]) -> str:
    """Names the entry that would run Python code of a folder or of a hub repository, if any."""
    for key, value in _nested(settings):
        is_kernel = key.endswith("_implementation") and isinstance(value, str) and "/" in value
        if (key == "auto_map" and value) or is_kernel:
            return f"{key}={value!r:.100}"
    return ""


def _check_setting(key: str, value: Any) -> None:
    """Refuses one value of a config.json.

    Raises:
        ValueError: It is a number that no model has.
    """
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{key:.60}=NaN is no number")
    if isinstance(value, int) and COUNTS.search(key) and value > MOST_PARTS:
        raise ValueError(f"{key:.60}={value} must be at most {MOST_PARTS:,}")


def _nested(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields every key with its value, at all depths; an item of a list has the list's key.

    Raises:
        ValueError: Nested more deeply than any model's file.
    """
    level: list[tuple[str, Any]] = list(settings.items())
    for _ in range(DEEPEST_SETTINGS):
        yield from level
        below: list[tuple[str, Any]] = []
        for key, value in level:
            if isinstance(value, dict):
                below += value.items()
            elif isinstance(value, list):
                below += [(key, item) for item in value]
        level = below
    if level:
        raise ValueError("it is nested too deeply")


def unloadable(path: str, error: Exception, part: str = "") -> ConfigError:
    reason = f"{part}: {first_line(error)}" if part else first_line(error)
    if Path(path).is_dir():
        return ConfigError(f"cannot load {path}", why=reason)
    return ConfigError(
        f"{path:.200} not found locally, nor on the hub",
        why=reason,
        fix="download it into checkpoints/ on a machine with network access",
    )


def first_line(error: Exception) -> str:
    """Returns the first line of a message, with the next ones while they only announce it."""
    text, *more = [line.strip() for line in str(error).strip().splitlines()] or [""]
    while text.endswith(":") and more:
        text += f" {more.pop(0)}"
    text = text[:LONGEST_REASON]
    # Of an error that was not made to be read, the message alone says little: 'layers'.
    readable = isinstance(error, (OSError, ValueError, RuntimeError, ImportError))
    if text and (readable or type(error) is Exception):
        return text
    return f"{type(error).__name__}: {text}".removesuffix(": ")
