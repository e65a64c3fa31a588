"""A folder passes for whole only if every byte of it is what was written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distilllens.errors import CheckpointError
from distilllens.runtime.faults import VARIABLE, InjectedFault
from distilllens.runtime.manifest import (
    FORMAT_VERSION,
    FileRecord,
    HashedFile,
    clean_leftovers,
    delete_state,
    draft_folder,
    find_damage,
    hash_folder,
    newest_good_state,
    read_manifest,
    replace_folder,
    saved_states,
    write_hashed,
    write_manifest,
)

FILES = {"a.bin": b"\0\1\2\3" * 300, "in/b.json": b"{}", "in/deep/c": b"", "name with ü": b"x"}


def commit(folder: Path, files: dict[str, bytes] | None = None, **facts: Any) -> Path:
    """Makes a committed folder."""
    for name, content in (FILES if files is None else files).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_manifest(folder, hash_folder(folder), {"step": 7, **facts})
    return folder


def forge(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes a manifest as someone would who knows how its digest is made."""
    content = json.loads((folder / "manifest.json").read_text())
    if (other := change(content)) is not None:
        content = other
    if isinstance(content, dict):
        rest = {k: v for k, v in content.items() if k != "manifest_sha256"}
        digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
        content["manifest_sha256"] = digest.hexdigest()
    (folder / "manifest.json").write_text(json.dumps(content))


def test_hashes_are_those_of_the_bytes(tmp_path: Path) -> None:
    content = os.urandom(100_003)
    record = write_hashed(tmp_path / "one", content)
    with HashedFile(tmp_path / "two") as file:
        for start in range(0, len(content), 999):
            file.write(memoryview(content)[start : start + 999])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == content
    expected = FileRecord(100_003, hashlib.sha256(content).hexdigest())
    assert record == file.record() == expected == hash_folder(tmp_path)["one"]


def test_a_file_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("before")
    with pytest.raises(FileExistsError):
        write_hashed(tmp_path / "one", b"after")
    assert (tmp_path / "one").read_text() == "before"


def test_an_untouched_folder_is_whole_and_tells_its_facts(tmp_path: Path) -> None:
    folder = commit(tmp_path / "step-7", epoch=2)
    assert find_damage(folder) == ""
    content = read_manifest(folder)
    assert (content["step"], content["epoch"], content["format_version"]) == (7, 2, FORMAT_VERSION)
    assert {name: f["size"] for name, f in content["files"].items()} == {
        name: len(data) for name, data in FILES.items()
    }


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "zero": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "flipped": lambda path: path.write_bytes(
        bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [name for name, content in FILES.items() if content])
def test_damage_is_found_and_named(tmp_path: Path, name: str, damage: str) -> None:
    folder = commit(tmp_path / "step-7")
    DAMAGES[damage](folder / name)
    message = find_damage(folder)
    assert message.startswith(str(folder / name))
    words = {"missing": "is missing", "flipped": "sha256 differs"}
    assert words.get(damage, " bytes") in message


def test_every_flipped_bit_of_a_manifest_that_matters_is_found(tmp_path: Path) -> None:
    folder = commit(tmp_path / "step-7")
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x04]) + whole[position + 1 :])
        assert find_damage(folder), f"byte {position}: {whole[position - 5 : position + 5]!r}"
    path.write_bytes(whole)
    assert find_damage(folder) == ""


def test_files_that_no_manifest_names_are_refused(tmp_path: Path) -> None:
    folder = commit(tmp_path / "step-7")
    (folder / "in/mp_rank_01_model_states.pt").write_bytes(b"loaded by a pattern")
    assert find_damage(folder).endswith("mp_rank_01_model_states.pt is not in the manifest")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: [],
        lambda content: "text",
        lambda content: content.update(files=[]),
        lambda content: content.update(files={"a.bin": 3}),
        lambda content: content["files"].update({"a.bin": {"size": "1200"}}),
        lambda content: content["files"].update({"a.bin": {"size": True, "sha256": 1}}),
        lambda content: content["files"].update({"../outside": content["files"]["in/b.json"]}),
        lambda content: content["files"].update({"/etc/passwd": {"size": 1, "sha256": ""}}),
        lambda content: content["files"].pop("a.bin") and None,
        lambda content: content.pop("files") and None,
        lambda content: content.pop("format_version") and None,
        lambda content: content.update(format_version=FORMAT_VERSION + 1),
    ],
)
def test_forged_manifests_are_refused_not_followed(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    (tmp_path / "outside").write_bytes(b"{}")
    folder = commit(tmp_path / "step-7")
    forge(folder, change)
    assert find_damage(folder)


def test_hostile_json_is_damage(tmp_path: Path) -> None:
    folder = commit(tmp_path / "step-7")
    for text in (b"[" * 200_000, b"\xff\xfe", b"", b"null", b'{"manifest_sha256": NaN}'):
        (folder / "manifest.json").write_bytes(text)
        assert "manifest.json" in find_damage(folder)
        with pytest.raises(CheckpointError):
            read_manifest(folder)


# --- Which one ----------------------------------------------------------------------------------


def test_states_are_ordered_by_number_and_drafts_are_none(tmp_path: Path) -> None:
    for name in ("step-9", "step-10", "step-2", ".tmp-step-12", "damaged-step-11", "step-x"):
        commit(tmp_path / name)
    (tmp_path / "step-30").mkdir()
    assert [path.name for path in saved_states(tmp_path)] == ["step-2", "step-9", "step-10"]
    assert saved_states(tmp_path / "nowhere") == []


def test_the_newest_that_verifies_is_chosen(tmp_path: Path) -> None:
    states = {n: commit(tmp_path / f"step-{n}") for n in (2, 9, 10, 11)}
    assert newest_good_state(tmp_path) == (states[11], {})
    (states[11] / "a.bin").unlink()
    (states[10] / "manifest.json").unlink()
    (states[2] / "a.bin").unlink()  # older than the one that is good: not even looked at
    good, damaged = newest_good_state(tmp_path)
    assert good == states[9] and list(damaged) == [states[11], states[10]]
    assert damaged[states[11]] == f"{states[11]}/a.bin is missing"
    assert damaged[states[10]] == f"{states[10]}/manifest.json is missing"
    shutil.rmtree(states[9])
    assert newest_good_state(tmp_path)[0] is None


# --- Deaths -------------------------------------------------------------------------------------


def dies(work: Callable[[], object]) -> bool:
    """Does ``work`` in a process of its own; whether that was killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9


@pytest.mark.parametrize("point", ["before", "after_manifest", "after_rename", "after"])
def test_killed_while_deleting(tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = commit(tmp_path / "step-1"), commit(tmp_path / "step-2")
    monkeypatch.setenv(VARIABLE, f"delete.{point}=KILL")
    assert dies(lambda: delete_state(old))
    assert newest_good_state(tmp_path) == (new, {})
    assert (old in saved_states(tmp_path)) == (point == "before")
    clean_leftovers(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"step-2"} | ({"step-1"} if point in ("before", "after_manifest") else set())


@pytest.mark.parametrize("point", ["before", "between", "after"])
@pytest.mark.parametrize("action", ["KILL", "RAISE", "ENOSPC"])
def test_interrupted_while_replacing(
    tmp_path: Path, point: str, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "best-1"  # a name with a hyphen, as the process's number follows one
    draft = draft_folder(folder)
    for place, content in ((folder, "old"), (draft, "new")):
        place.mkdir()
        (place / "model").write_text(content)
    monkeypatch.setenv(VARIABLE, f"replace.{point}={action}")
    if action == "KILL":
        assert dies(lambda: replace_folder(draft, folder))
    else:
        with pytest.raises(InjectedFault if action == "RAISE" else OSError):
            replace_folder(draft, folder)
        assert folder.is_dir()
    clean_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["best-1"]
    assert (folder / "model").read_text() == ("new" if point == "after" else "old")
