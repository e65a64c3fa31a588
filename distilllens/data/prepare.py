"""What the command ``prepare`` does: fetch the published sets, tokenise the training records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distilllens.config import DataConfig
from distilllens.data.benchmarks import BENCHMARKS
from distilllens.data.tokenize import PreparedData, prepare_dataset
from distilllens.errors import DataError
from distilllens.models import load_model_config, load_tokenizer

PUBLISHED_SETS = {
    "dolly": "MiniLLM/dolly",
    "self_inst": "MiniLLM/self-inst",
    "vicuna": "MiniLLM/Vicuna",
    "sinst": "MiniLLM/sinst",
    "uinst": "MiniLLM/uinst",
}
"""Set → its repository on the Hugging Face hub."""
HUB_TIMEOUT = 5.0
"""Seconds to wait for the hub's first answer."""


def download_published_sets(data_dir: str | Path, *, console: Console) -> None:
    """Fetches Dolly with its training records and the five evaluation sets.

    Files that are there already are kept. Without a connection it stops within seconds.

    Args:
        data_dir: Parent of the sets' folders.
        console: For one line about each file.

    Raises:
        DataError: The hub cannot be reached or has no such file.
    """
    folder = Path(data_dir)
    files = [("dolly", "raw.jsonl")]
    files += [(name, path.removeprefix(f"{name}/")) for name, (path, _) in BENCHMARKS.items()]
    missing = [(name, file) for name, file in files if not (folder / name / file).is_file()]
    for name, file in files:
        if (name, file) not in missing:
            console.print(f"{folder / name / file}: kept", soft_wrap=True, highlight=False)
    if missing:
        _check_connection(PUBLISHED_SETS[missing[0][0]])
    for name, file in missing:
        repository = PUBLISHED_SETS[name]
        try:
            hf_hub_download(
                repository,
                file,
                repo_type="dataset",
                local_dir=folder / name,
                etag_timeout=HUB_TIMEOUT,
            )
        except OSError as error:
            raise _unreachable(f"{repository}: {file} was not fetched", error) from None
        console.print(f"{folder / name / file}: fetched", soft_wrap=True, highlight=False)


def counts_table(prepared: PreparedData) -> Table:
    """Returns the counts of the stored data as a table."""
    rows = {
        "records": "records",
        "used": "used",
        "overlong_prompts": "dropped: prompt too long",
        "empty_answers": "dropped: empty answer",
        "cut_responses": "response cut",
        "prompt_tokens": "prompt tokens",
        "response_tokens": "response tokens",
        "longest": "longest record, tokens",
    }
    # As Text: in a plain string, the brackets of a folder's name would be read as markup.
    title = Text(f"{prepared.folder} · {prepared.stats['skipped_lines']:,} broken lines skipped")
    table = Table("", "train", "dev", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for key, label in rows.items():
        table.add_row(label, *(f"{prepared.stats[part][key]:,}" for part in ("train", "dev")))
    return table


def prepare_records(
    model: str,
    data: DataConfig,
    *,
    dev_size: int,
    trust_remote_code: bool,
    revision: str | None,
    console: Console,
) -> PreparedData:
    """Tokenises the training records with the tokenizer of a model folder (or hub name).

    Raises:
        ConfigError: The model is not there, or as `prepare_dataset`.
        DataError, StorageError: As `prepare_dataset`.
    """
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    return prepare_dataset(
        data=data,
        dev_size=dev_size,
        tokenizer=load_tokenizer(model, **trust, option="--model"),
        family=load_model_config(model, **trust).model_type,
        console=console,
    )


def _check_connection(repository: str) -> None:
    """One request without retries; the download itself would retry for 23 s to 6 minutes."""
    try:
        HfApi().dataset_info(repository, timeout=HUB_TIMEOUT)
    except Exception as error:  # transport errors are httpx's or httpx2's, by the hub's version
        raise _unreachable(f"cannot reach {repository} on the Hugging Face hub", error) from None


def _unreachable(what: str, error: Exception) -> DataError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return DataError(
        what,
        why=reason,
        fix="connect and try again, or put the files into data/ as data/README.md describes",
    )
