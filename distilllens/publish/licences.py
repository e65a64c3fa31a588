"""The licence of a folder, as its own files tell it; never a guess."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from huggingface_hub import metadata_load

LICENCE_TITLES = {
    "apache-2.0": r"Apache License,?\s+Version 2\.0(?:, January 2004)?",
    "mit": r"(?:The )?MIT License(?: \(MIT\))?",
    "bsd-3-clause": r"(?:The )?BSD 3-Clause License",
    "llama2": r"LLAMA 2 COMMUNITY LICENSE AGREEMENT",
}
"""Identifier of the hub → the whole title that the licence's text begins with."""


def find_licence(folder: Path) -> tuple[str | None, str]:
    """Returns a folder's licence as the hub names it, and the file that says so.

    Looks into the front matter of README.md, and if that names none, for texts that begin with the
    title of a licence known here. Never guesses: None, and what there is to read, where neither
    tells it, where the front matter names several or another one, and where texts differ.
    """
    readme = folder / "README.md"
    try:
        front = metadata_load(readme) if readme.is_file() else None
    except (OSError, ValueError, yaml.YAMLError):
        front = None
    licence = front.get("license") if isinstance(front, dict) else None
    if licence not in (None, "", "unknown"):
        is_one = isinstance(licence, str) and licence != "other"
        return (licence, "README.md") if is_one else (None, "README.md there names no single one")
    names = sorted(p for p in folder.glob("*") if re.match(r"(?i)licen[cs]e|copying", p.name))
    files = [path for path in names if path.is_file()]
    found = [_licence_of_text(file) for file in files]
    if not files:
        return None, ""
    if None in found:
        return None, f"{files[found.index(None)].name} there is not one known here"
    return (found[0], files[0].name) if len(set(found)) == 1 else (None, "texts of several there")


def _licence_of_text(file: Path) -> str | None:
    head = file.read_text(encoding="utf-8", errors="replace")[:2000]
    for name, title in LICENCE_TITLES.items():
        if re.match(rf"[\s#*=_-]*{title}[ \t#*=_-]*(?:\n|\Z)", head):
            return name
    return None
