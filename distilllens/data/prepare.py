"""``python -m distilllens prepare``: fetch the published sets, tokenise the training records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge
from huggingface_hub import HfApi, hf_hub_download
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distilllens.config import DataConfig, EvalConfig
from distilllens.data.benchmarks import BENCHMARKS
from distilllens.data.tokenize import PreparedData, prepare_dataset
from distilllens.errors import ConfigError, DataError
from distilllens.models import load_model_config, load_tokenizer
from distilllens.parsing import parse_arguments
from distilllens.ranges import Count, Whole

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


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Tokenise a training set once: `python -m distilllens prepare --model DIR --data DIR`."""

    model: str | None = None
    """Folder (or hub name) of the student, for its tokenizer; needed unless only downloading."""
    data: str = DataConfig.path
    """Folder with raw.jsonl, or a raw.jsonl's folder that --download fills."""
    generated: str | None = DataConfig.generated
    """Folder made by `python -m distilllens generate`: its answers replace the records' own."""
    keep_gold: bool = DataConfig.keep_gold
    """Keep the records' own answers too; needs generated."""
    processed: str | None = DataConfig.processed
    """Folder of the tokenised data, made anew where it does not fit; default: one for each choice
    of tokenizer, lengths and records, processed_data/NAME/{full,generated-FOLDER}/FAMILY-HASH."""
    max_length: Annotated[int, Ge(2)] = DataConfig.max_length
    """Longest prompt + response in tokens; longer responses are cut."""
    max_prompt_length: Count = DataConfig.max_prompt_length
    """Longest prompt in tokens; records with longer prompts are dropped, counted and told."""
    dev_size: Whole = EvalConfig.dev_size
    """Records at the head of raw.jsonl that are held out as the dev set."""
    bad_lines: Literal["error", "skip"] = DataConfig.bad_lines
    """What a broken record does: stop with file and line, or skip it and count."""
    download: bool = False
    """Fetch the published sets (Dolly, SelfInst, Vicuna, S-NI, UnNI) into data_dir first."""
    data_dir: str = "data"
    """Folder that --download fills: data_dir/dolly, data_dir/self_inst and so on."""
    trust_remote_code: bool = False
    """Run the Python code that a model folder brings along. Only with a pinned revision."""
    revision: str | None = None
    """Commit hash of the model's hub repository."""


def prepare_main(argv: Sequence[str]) -> int:
    """Runs the command; 0 when all is done.

    Raises:
        ConfigError: Unknown flags, no model, a model folder that is not there.
        DataError: Broken records, or the hub cannot be reached.
        StorageError: The target folder cannot be written.
    """
    config = parse_arguments(PrepareConfig, argv, prog="-m distilllens prepare")
    console = Console()
    if config.model is None and not config.download:
        raise ConfigError(
            "prepare needs --model, the folder of the student", why="its tokenizer makes the tokens"
        )
    if config.trust_remote_code and not config.revision:
        raise ConfigError("--trust_remote_code needs --revision")
    if config.keep_gold and config.generated is None:
        raise ConfigError("--keep_gold needs --generated")
    if config.download:
        download_published_sets(config.data_dir, console=console)
    if config.model is not None:
        console.print(counts_table(_prepare(config, config.model, console)))
    return 0


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


def _prepare(config: PrepareConfig, model: str, console: Console) -> PreparedData:
    trust: dict[str, Any] = {
        "trust_remote_code": config.trust_remote_code,
        "revision": config.revision,
    }
    return prepare_dataset(
        data=DataConfig(
            path=config.data,
            generated=config.generated,
            keep_gold=config.keep_gold,
            processed=config.processed,
            max_length=config.max_length,
            max_prompt_length=config.max_prompt_length,
            bad_lines=config.bad_lines,
        ),
        dev_size=config.dev_size,
        tokenizer=load_tokenizer(model, **trust),
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
