"""Imports go only downward, and only to libraries that requirements.txt names."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "distilllens"

FLOORS = """
    errors statistics ranges plain_yaml parsing config runtime runs public
    divergence kernels fused families lens layers model_files models data
    hidden lens_matrix objective student teacher training
    evaluation report tracking publish checkpoint sweep
    dev_evaluation keeper trainer commands session
    cli __main__
""".split()
"""From the ground up; a module imports from its own floor or lower ones, a package is one floor."""

PURE = [
    "divergence",
    "fused",
    *("kernels." + name for name in ("products", "row_gradients", "row_kernel", "chunks")),
]
"""The mathematics: usable, and readable, without the libraries around it."""


STANDARD = sys.stdlib_module_names | {"_typeshed"}
"""Python's own modules, and the one that only type checkers have."""


def module_name(path: Path) -> str:
    """``distilllens/data/records.py`` → ``data.records``."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(path: Path) -> Iterator[str]:
    """Yields the full names of all modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            yield node.module
            if (PACKAGE.parent / node.module.replace(".", "/")).is_dir():
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """Returns the imported modules of the package, without its name, that are files or folders."""
    names = {name.removeprefix("distilllens.") for name in imported_modules(path)}
    return {name for name in names if is_module(name)}


def is_module(name: str) -> bool:
    place = PACKAGE / name.replace(".", "/")
    return place.is_dir() or place.with_suffix(".py").is_file()


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
del FILES["__init__"]


def test_every_module_has_a_floor() -> None:
    floors = {name.partition(".")[0] for name in FILES}
    assert floors <= set(FLOORS), "say in FLOORS where these stand"
    assert len(set(FLOORS)) == len(FLOORS)


def test_architecture_names_every_module() -> None:
    told = set(re.findall(r"\w+", (ROOT / "docs/architecture.md").read_text(encoding="utf-8")))
    assert {name.rpartition(".")[2] for name in FILES} - told == {"__main__"}


@pytest.mark.parametrize("name", FILES)
def test_imports_go_downward(name: str) -> None:
    floor = name.partition(".")[0]
    upward = {
        imported
        for imported in own_imports(FILES[name])
        if FLOORS.index(imported.partition(".")[0]) > FLOORS.index(floor)
    }
    assert not upward, f"{name} imports from above: {sorted(upward)}"


def test_no_import_goes_in_circles() -> None:
    needs = {name: own_imports(path) & set(FILES) - {name} for name, path in FILES.items()}
    assert not in_circles(needs)


@pytest.mark.parametrize("package", ["data", "evaluation", "report"])
def test_no_import_goes_in_circles_between_the_rooms_of_a_package(package: str) -> None:
    """A room is a module of the package or one of its own packages."""
    needs: dict[str, set[str]] = {}
    for name, path in FILES.items():
        if name.startswith(f"{package}."):
            room = name.split(".")[1]
            inside = (n for n in own_imports(path) if n.startswith(f"{package}."))
            needs.setdefault(room, set()).update({n.split(".")[1] for n in inside} - {room})
    assert not in_circles(needs)


def in_circles(needs: dict[str, set[str]]) -> dict[str, set[str]]:
    """Returns what is left after all that needs nothing, or only such, was taken out."""
    waiting = {name: set(others) for name, others in needs.items()}
    while free := [name for name, others in waiting.items() if not others & set(waiting)]:
        for name in free:
            del waiting[name]
    return waiting


@pytest.mark.parametrize("name", PURE)
def test_mathematics_needs_only_torch(name: str) -> None:
    libraries = {module.partition(".")[0] for module in imported_modules(FILES[name])}
    assert libraries - set(sys.stdlib_module_names) <= {
        "torch",
        "triton",
        "jaxtyping",
        "distilllens",
    }
    assert own_imports(FILES[name]) <= {*PURE, "kernels"}


def test_only_named_libraries_are_imported() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = {
        normalize(re.split(r"[\[<>=]", line)[0])
        for line in lines
        if line.strip() and not line.startswith("#")
    }
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for extra in ("judge", "harness"):  # imported late, after a look whether they are there
        lines = pyproject["project"]["optional-dependencies"][extra]
        required |= {normalize(re.split(r"[\[<>=]", line)[0]) for line in lines}
    owners = packages_distributions()
    for path in [*FILES.values(), ROOT / "train.py", ROOT / "evaluate.py"]:
        for module in imported_modules(path):
            top = module.partition(".")[0]
            if top in STANDARD or top in ("distilllens", "triton"):  # torch brings Triton for GPUs
                continue
            named = {normalize(owner) for owner in owners.get(top, [top])} & required
            assert named, f"{path.name} imports {top}, which requirements.txt does not name"


def normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
