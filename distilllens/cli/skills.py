"""``python -m distilllens skills``: the embedded data set, and models to start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge
from rich.console import Console

from distilllens.parsing import parse_arguments
from distilllens.ranges import Whole


@dataclass(frozen=True, kw_only=True)
class SkillsConfig:
    """Make the embedded data set: `python -m distilllens skills --out data/skills`."""

    out: str = "data/skills"
    """Folder that gets raw.jsonl (dev records, then train) and valid.jsonl (test)."""
    seed: Whole = 0
    """Seed of the records, and of the models' random weights."""
    train: Whole = 20000
    """Number of training records."""
    dev: Whole = 200
    """Number of dev records at the head of raw.jsonl; give it to training as eval.dev_size."""
    test: Whole = 240
    """Number of test records."""
    models: str | None = None
    """Folder that gets skills-teacher-init/ and skills-student-init/; default: no models."""
    vocab_size: Annotated[int, Ge(300)] = 2048
    """Largest vocabulary of the models' tokenizer, in tokens."""


def skills_main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 0 when all is written.

    Raises:
        ConfigError: Unknown flags or values of a wrong type.
        DataError: More records asked for than there are different prompts.
    """
    config = parse_arguments(SkillsConfig, argv, prog="python -m distilllens skills")
    # Late: torch and transformers take seconds, which help and typos need not wait for.
    from distilllens.commands.skills import build_tiny_models, kinds_table
    from distilllens.data.skills.records import train_skill_tokenizer, write_skills
    from distilllens.runtime.libraries import quiet_libraries

    quiet_libraries()
    console = Console()
    skills = write_skills(
        config.out, seed=config.seed, train=config.train, dev=config.dev, test=config.test
    )
    console.print(kinds_table(skills))
    console.print(
        f"{config.out}/raw.jsonl: {config.dev:,} dev and {config.train:,} training records; "
        f"{config.out}/valid.jsonl: {config.test:,} test records",
        soft_wrap=True,
    )
    if config.models is not None:
        tokenizer = train_skill_tokenizer(skills.train, vocab_size=config.vocab_size)
        for folder in build_tiny_models(config.models, tokenizer=tokenizer, seed=config.seed):
            console.print(f"{folder}: a random model to start from", soft_wrap=True)
    return 0
