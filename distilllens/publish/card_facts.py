"""What a model card tells of a training, read from the run's folder; kept beside the weights.

Everything here may be published: paths outside the project have lost their folders, and what looks
like a key is gone. Nothing in it depends on the clock, so one training gives the same facts again.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from distilllens.config import TrainConfig
from distilllens.errors import ConfigError, DataError, UserError
from distilllens.evaluation.cells.provenance import checkpoint_fingerprint
from distilllens.models import load_model_config, num_blocks
from distilllens.public import public_command, public_path, public_values
from distilllens.publish.licences import find_licence
from distilllens.runs import FACTS_FILE, RunFolder, read_json, redact, replace_text
from distilllens.training.deepspeed_file import load_deepspeed_config
from distilllens.training.setup import count_steps

BESIDE_THE_RESULT = ("run", "tracking", "generate", "dry_run", "debug")
"""Sections and options that do not decide what is trained; of ``run``, the seed does."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """One of the models that a training began with; None is what could not be found out."""

    name: str
    """As given; of a folder outside the project, its last part."""
    is_hub_name: bool
    architecture: str | None
    num_blocks: int | None
    num_parameters: int | None
    fingerprint: str | None
    """From `checkpoint_fingerprint`."""
    licence: str | None
    """Identifier as the hub knows it."""
    licence_source: str
    """The file that says so, or what was found instead."""


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """The training data."""

    file: str
    fingerprint: str | None
    num_train: int | None
    """Records that are trained on; ``num_there`` of them are there."""
    num_there: int | None
    num_dev: int | None
    num_tokens: int | None
    """Response tokens of the records that are there."""
    licence: str | None
    licence_source: str


@dataclass(frozen=True, kw_only=True)
class Said:
    """What only the publisher can know; given to `python -m distilllens card`."""

    licence: str | None = None
    base_model: str | None = None
    """Hub name of the student that the training began with."""
    datasets: tuple[str, ...] = ()
    language: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """All that a card tells but the evaluations."""

    student: ModelFacts
    teacher: ModelFacts | None
    data: DataFacts
    options: dict[str, Any]
    """The resolved configuration, as far as it decides what is trained."""
    pairs: tuple[tuple[int, int], ...]
    """Blocks of teacher and student that the lens or the hidden-state term compares."""
    world_size: int
    zero_stage: int | None
    precision: str | None
    steps_per_epoch: int | None
    total_steps: int | None
    git_commit: str
    versions: dict[str, str]
    command: tuple[str, ...]
    """What started the training, without where it wrote."""
    step: int | None = None
    """Optimizer step of the weights."""
    dev: dict[str, float] = field(default_factory=dict)
    """Metrics on the dev set at that step."""
    chat: Literal["template", "text only", "not written"] = "not written"
    """Whether the model's folder has the chat template of training; "text only": its tokenizer
    cannot give the right tokens through one; "not written": an earlier version made the folder."""
    adapter_licence: str | None = None
    """Of the adapter that was merged into the teacher."""
    adapter_licence_source: str = ""
    said: Said = field(default_factory=Said)


# --- Files --------------------------------------------------------------------------------------


def write_facts(folder: Path, facts: CardFacts) -> None:
    """Writes the facts into a model's folder."""
    text = json.dumps(dataclasses.asdict(facts), indent=2, ensure_ascii=False)
    replace_text(folder / FACTS_FILE, redact(text) + "\n")


def read_facts(folder: Path) -> CardFacts | None:
    """Reads the facts in a model's folder; None where there are none.

    Raises:
        DataError: The file is damaged, or of another version of this program.
    """
    path = folder / FACTS_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        teacher, said = content["teacher"], content["said"]
        content |= {
            "student": ModelFacts(**content["student"]),
            "teacher": None if teacher is None else ModelFacts(**teacher),
            "data": DataFacts(**content["data"]),
            "pairs": tuple((pair[0], pair[1]) for pair in content["pairs"]),
            "command": tuple(content["command"]),
            "said": Said(
                **said | {"datasets": tuple(said["datasets"]), "language": tuple(said["language"])}
            ),
        }
        return CardFacts(**content)
    except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
        raise DataError(
            f"{path} cannot be read",
            why=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
            fix="export the model again",
        ) from None


def facts_of_run(run: RunFolder, config: TrainConfig) -> CardFacts:
    """Collects the facts from what a run has recorded and from its models' folders.

    Raises:
        DataError: A file of the run is damaged.
    """
    environment, data = read_json(run.environment, {}), read_json(run.data, {})
    world_size = int(environment.get("machine", {}).get("world_size", 1))
    described = _describe_data(config, data)
    num_train = described.num_train
    try:
        deepspeed, dtype = load_deepspeed_config(config)
        zero_stage = int(deepspeed.get("zero_optimization", {}).get("stage", 0))
        precision = str(dtype).removeprefix("torch.")
    except UserError:  # the file went since
        zero_stage, precision = None, None
    teacher = None if config.objective.approach == "sft" else config.model.teacher
    try:
        steps = None if num_train is None else count_steps(config, num_train, world_size)
    except UserError:
        steps = None
    adapter = None if teacher is None else config.model.teacher_lora
    licence, source = (None, "") if adapter is None else find_licence(Path(adapter))
    return CardFacts(
        student=describe_model(config.model.student, config),
        teacher=None if teacher is None else describe_model(teacher, config),
        data=described,
        options=public_values(_options(config)),
        pairs=tuple((pair["teacher"], pair["student"]) for pair in read_json(run.layers, [])),
        world_size=world_size,
        zero_stage=zero_stage,
        precision=precision,
        steps_per_epoch=None if steps is None else steps.steps_per_epoch,
        total_steps=None if steps is None else steps.total_steps,
        git_commit=str(environment.get("git_commit", "unknown")),
        versions=dict(environment.get("versions", {})),
        command=public_command(shlex.split(str(environment.get("command", "")))),
        adapter_licence=licence,
        adapter_licence_source=source,
    )


def dev_metrics_at(run: RunFolder, step: int) -> dict[str, float]:
    """Returns what metrics.jsonl says of the dev set at a step; nothing where it says nothing."""
    if not run.metrics.is_file():
        return {}
    found: dict[str, float] = {}
    for raw in run.metrics.read_bytes().splitlines():
        try:
            line = json.loads(raw)
        except ValueError:  # half a line: the process died while writing it
            continue
        if isinstance(line, dict) and line.get("step") == step:
            found |= {k: v for k, v in line.items() if k.startswith("eval/dev/")}
    return found


def _options(config: TrainConfig) -> dict[str, Any]:
    options = dataclasses.asdict(config)
    kept = {name: value for name, value in options.items() if name not in BESIDE_THE_RESULT}
    return {"run": {"seed": config.run.seed}, **kept}


# --- Models and data ----------------------------------------------------------------------------


def describe_model(name: str, config: TrainConfig) -> ModelFacts:
    """Looks at a model's folder; of a hub name, only its configuration is looked up."""
    folder = Path(name)
    is_folder = folder.is_dir()
    revision = config.model.revision
    try:
        settings = load_model_config(
            name, trust_remote_code=config.model.trust_remote_code, revision=revision
        )
        architecture = next(iter(settings.architectures or ()), settings.model_type)
        blocks = num_blocks(settings)
    except (UserError, OSError, ValueError, AttributeError):
        architecture, blocks = None, None
    licence, source = find_licence(folder) if is_folder else (None, "")
    looks_like_a_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    return ModelFacts(
        name=public_path(name),
        is_hub_name=architecture is not None and not is_folder and not looks_like_a_path,
        architecture=architecture,
        num_blocks=blocks,
        num_parameters=count_parameters(folder),
        fingerprint=checkpoint_fingerprint(name, revision) if is_folder else None,
        licence=licence,
        licence_source=source,
    )


def count_parameters(folder: Path) -> int | None:
    """Adds up the sizes in the heads of a folder's weights; None where it has none to read."""
    total = 0
    try:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="numpy") as weights:
                for name in weights.keys():  # noqa: SIM118 (no mapping)
                    size = 1
                    for length in weights.get_slice(name).get_shape():
                        size *= length
                    total += size
    except (OSError, SafetensorError):
        return None
    return total or None


def _describe_data(config: TrainConfig, data: Mapping[str, Any]) -> DataFacts:
    folder = Path(config.data.path).expanduser()
    licence, source = find_licence(folder)
    there, limit = data.get("train", {}).get("used"), config.data.train_size
    return DataFacts(
        file=f"{public_path(config.data.path)}/raw.jsonl",
        fingerprint=data.get("fingerprint"),
        num_train=there if there is None or limit is None else min(there, limit),
        num_there=there,
        num_dev=data.get("dev", {}).get("used"),
        num_tokens=data.get("train", {}).get("response_tokens"),
        licence=licence,
        licence_source=source,
    )


# --- Where a model lies --------------------------------------------------------------------------


def run_of_model(folder: Path) -> RunFolder | None:
    """Returns the run that a model's folder lies in (best/, latest/), if it does."""
    run = RunFolder(folder.resolve().parent)
    return run if run.config.is_file() and folder.name in ("best", "latest") else None


def state_around(folder: Path) -> Path | None:
    """Returns the saved state that a folder is a part of, if it is."""
    parent = folder.resolve().parent
    return parent if (parent / "manifest.json").is_file() else None


def refuse_state(folder: Path) -> None:
    """Refuses to change what a saved state's manifest has hashed.

    Raises:
        ConfigError: The folder is a part of a state.
    """
    if (state := state_around(folder)) is not None:
        raise ConfigError(
            f"{folder} is a part of the saved state {state}",
            why="a state with a changed file counts as damaged",
            fix=f"python -m distilllens export {state} --to DIR, then use DIR",
        )
