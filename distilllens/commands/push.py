"""How an exported model goes to the hub.

Only what belongs to a model is sent: never pickles, states or logs. The hub's library sends it, in
parts: the same command after a stop sends what has not arrived. The token is that of ``HF_TOKEN``
or of ``hf auth login``; it is never shown.
"""

from __future__ import annotations

import fnmatch
import json
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import HfApi, metadata_load
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from distilllens.errors import CheckpointError, ConfigError, StorageError, UserError
from distilllens.model_files import check_folder
from distilllens.publish.card import CARD, UNKNOWN
from distilllens.publish.card_facts import count_parameters, refuse_state
from distilllens.runs import FACTS_FILE, redact

SENT = (
    *(CARD, FACTS_FILE, "LICENSE*", "LICENCE*", "NOTICE*"),
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
)
"""Names of files that belong to a model."""


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """What of a folder is sent."""

    files: list[Path]
    left_out: list[str]
    """Names of what stays behind."""

    @property
    def num_bytes(self) -> int:
        """Of all files that are sent."""
        return sum(file.stat().st_size for file in self.files)


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool,
    revision: str | None,
    message: str,
    dry_run: bool,
    allow_unknown_licence: bool,
    api: HfApi | None = None,
) -> None:
    """Checks a model's folder, tells what goes where, and sends it.

    Args:
        folder: Of an exported model.
        repo_id: Where it goes.
        private: Make a private repository.
        revision: Branch; None: main.
        message: Of the commit.
        dry_run: Upload nothing.
        allow_unknown_licence: Upload although the card knows none.
        api: Of the hub; default: the one that ``HF_ENDPOINT`` and ``HF_TOKEN`` say.

    Raises:
        ConfigError: No card, an unknown licence, no name of the hub's, no right to write there.
        CheckpointError: Weights that cannot be read.
        StorageError: The hub was not reached, or failed.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        message = f"REPO_ID {repo_id!r} is none of the hub"
        raise ConfigError(message, why=str(error)) from None
    refuse_state(folder)
    parcel = check_folder_to_push(folder, allow_unknown_licence=allow_unknown_licence)
    kind = "private" if private else "public, if it is new"
    target = f"{repo_id} ({kind}), branch {revision or 'main'}"
    for file in parcel.files:
        print(f"  {file.stat().st_size:>15,}  {file.name}")
    if parcel.left_out:
        print(f"stays here: {', '.join(parcel.left_out)}")
    size = parcel.num_bytes / 1e6
    print(f"{folder} → {target}: {len(parcel.files)} files, {size:,.1f} MB")
    if dry_run:
        print("--dry_run: nothing was uploaded")
        return
    try:
        address = _send(
            api or HfApi(),
            folder,
            parcel,
            repo_id=repo_id,
            private=private,
            revision=revision,
            message=message,
        )
    except UserError:
        raise
    except Exception as error:  # transport errors are httpx's or httpx2's, by the hub's version
        raise explain(error, repo_id, folder) from None
    print(f"uploaded: {address}")


def check_folder_to_push(folder: Path, *, allow_unknown_licence: bool) -> Parcel:
    """Returns what of a model's folder is sent.

    Raises:
        ConfigError: No model, no card, a card with an unknown licence, or a link.
        CheckpointError: Weights are missing or cannot be read.
    """
    check_folder(str(folder), "config.json", may_be_hub_name=False)
    make_it = f"python -m distilllens card {folder}"
    if not (folder / CARD).is_file():
        raise ConfigError(f"{folder} has no model card", fix=make_it)
    try:
        front = metadata_load(folder / CARD) or {}
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{folder / CARD}: its head is not YAML", why=str(error)) from None
    licence = front.get("license")
    if licence in (None, "", "unknown") and not allow_unknown_licence:
        raise ConfigError(
            f"{folder / CARD}: the licence is {UNKNOWN}",
            why="a model inherits the terms of the models and the data that it was made from",
            fix=f"{make_it} --licence ID, or --allow_unknown_licence",
            kept="nothing was uploaded",
        )
    names = sorted(folder.iterdir())
    sent = [path for path in names if _is_sent(path)]
    if links := [path.name for path in sent if path.is_symlink()]:
        raise ConfigError(
            f"{folder / links[0]} is a link",
            why="what it points to may be anything, so no link is sent",
            fix=f"cp -rL {folder} FOLDER, look at what is there, and push FOLDER",
            kept="nothing was uploaded",
        )
    _check_weights(folder)
    return Parcel(files=sent, left_out=[path.name for path in names if path not in sent])


def _is_sent(path: Path) -> bool:
    """Whether a file, or a link, belongs to a model by its name."""
    is_file = path.is_file() or path.is_symlink()
    return is_file and any(fnmatch.fnmatchcase(path.name, pattern) for pattern in SENT)


def _check_weights(folder: Path) -> None:
    broken = ""
    if count_parameters(folder) is None:
        broken = "no safetensors file in it can be read whole"
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            broken = f"{index.name} is damaged"
        else:
            missing = sorted(name for name in files if not (folder / name).is_file())
            broken = broken or (f"{missing[0]} is missing" if missing else "")
    if broken:
        raise CheckpointError(
            f"{folder}: weights cannot be uploaded",
            why=broken,
            fix="export the model again",
            kept="nothing was uploaded",
        )


def _send(
    api: HfApi,
    folder: Path,
    parcel: Parcel,
    *,
    repo_id: str,
    private: bool,
    revision: str | None,
    message: str,
) -> str:
    """Makes the repository and the branch where they are not there, and uploads; returns where."""
    repo = api.create_repo(repo_id, private=True if private else None, exist_ok=True)
    if private and not api.repo_info(repo.repo_id).private:
        raise ConfigError(
            f"{repo.repo_id} is there already, and public",
            fix="another REPO_ID, or leave --private out",
            kept="nothing was uploaded",
        )
    if revision is not None:
        api.create_branch(repo.repo_id, branch=revision, exist_ok=True)
    api.upload_folder(
        repo_id=repo.repo_id,
        folder_path=folder,
        allow_patterns=[_literally(file.name) for file in parcel.files],
        revision=revision,
        commit_message=message,
    )
    return str(repo)


def _literally(name: str) -> str:
    """Returns a pattern that matches this name alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


REFUSALS = {
    401: (
        "the hub does not know you",
        "set HF_TOKEN to a token that may write, or `hf auth login`",
    ),
    403: ("you may not write there", "a token with the right to write, or another REPO_ID"),
    404: ("no such user, organisation or repository, or it is hidden from you", "check REPO_ID"),
}


def explain(error: Exception, repo_id: str, folder: Path) -> UserError:
    """Returns what a user should read of an error of the hub's library, without any token."""
    text = redact(" ".join(str(error).split())[:400]) or type(error).__name__
    kept = f"{folder} is untouched; the same command goes on, and sends only what has not arrived"
    what = f"{repo_id}: nothing or not all was uploaded"
    status = None
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
    if isinstance(error, OfflineModeIsEnabled):
        return ConfigError(what, why="HF_HUB_OFFLINE is set", fix="unset HF_HUB_OFFLINE", kept=kept)
    if isinstance(error, LocalTokenNotFoundError):
        status = 401
    if status in REFUSALS:
        why, fix = REFUSALS[status]
        return ConfigError(what, why=f"{why} ({text})", fix=fix, kept=kept)
    if status is not None:
        return StorageError(what, why=f"the hub answered {status}: {text}", kept=kept)
    if isinstance(error, ValueError):  # what the hub says of the card's head
        return ConfigError(what, why=f"the hub refuses it: {text}", kept=kept)
    return StorageError(
        what,
        why=f"the hub was not reached: {type(error).__name__}: {text}",
        fix="check the network and HF_ENDPOINT",
        kept=kept,
    )
