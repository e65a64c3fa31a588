"""``python -m distilllens prepare``: tokenise the training records, or download them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge
from rich.console import Console

from distilllens.config import DataConfig, EvalConfig
from distilllens.errors import ConfigError
from distilllens.parsing import parse_arguments
from distilllens.ranges import Count, Whole


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
    config = parse_arguments(PrepareConfig, argv, prog="python -m distilllens prepare")
    if config.model is None and not config.download:
        raise ConfigError(
            "prepare needs --model, the folder of the student", why="its tokenizer makes the tokens"
        )
    if config.trust_remote_code and not config.revision:
        raise ConfigError("--trust_remote_code needs --revision")
    if config.keep_gold and config.generated is None:
        raise ConfigError("--keep_gold needs --generated")
    # Late: torch and transformers take seconds, which help and typos need not wait for.
    from distilllens.data.prepare import counts_table, download_published_sets, prepare_records

    console = Console()
    if config.download:
        download_published_sets(config.data_dir, console=console)
    if config.model is not None:
        data = DataConfig(
            path=config.data,
            generated=config.generated,
            keep_gold=config.keep_gold,
            processed=config.processed,
            max_length=config.max_length,
            max_prompt_length=config.max_prompt_length,
            bad_lines=config.bad_lines,
        )
        prepared = prepare_records(
            config.model,
            data,
            dev_size=config.dev_size,
            trust_remote_code=config.trust_remote_code,
            revision=config.revision,
            console=console,
        )
        console.print(counts_table(prepared))
    return 0
