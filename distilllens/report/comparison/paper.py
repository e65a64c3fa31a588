"""The paper's averages beside our own, and in what our evaluation and training differ from its.

Rouge-L, mean of five test sets and five sampling seeds: arXiv 2602.13567, Table 1. Its figures for
single sets are not in this file, so only averages are set side by side.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from distilllens.report.comparison.training import PaperRun, training_differences
from distilllens.report.scores.load import Method, Score
from distilllens.report.scores.table import Summary, build_table
from distilllens.report.tables import MISSING
from distilllens.runs import FACTS_FILE

CITATION = "arXiv 2602.13567, Table 1"
METRIC = "rougeL"
PROMPTS = {"dolly": 500, "self_inst": 242, "vicuna": 80, "sinst": 1694, "uinst": 10_000}
SAMPLING_SEEDS = (10, 20, 30, 40, 50)
SETTINGS: Mapping[str, Any] = {
    "do_sample": True,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "no_repeat_ngram_size": 6,
    "max_new_tokens": 256,
    "max_prompt_length": 256,
}
"""Of the paper's generation: 512 tokens with the prompt, of which the prompt has up to 256."""


@dataclass(frozen=True, kw_only=True)
class PaperModel:
    """A model of the paper, told by its size."""

    name: str
    folder: str
    """Its folder under checkpoints/, as the scripts call it."""
    blocks: int
    width: int


@dataclass(frozen=True, kw_only=True)
class PaperStudent:
    """A student of Table 1."""

    model: PaperModel
    pair: str
    """Of student and teacher, as the files in configs/ call it."""
    averages: Mapping[tuple[str, str], tuple[str, float]]
    """By APPROACH and TYPE of our folders: the paper's name of the row, and its average."""
    teacher: PaperModel
    teacher_average: float


def _averages(
    sft: float, kd: float, seqkd: float, rkl: float, both: float, jsd: float, akl: float,
    distill_lens: float,
) -> dict[tuple[str, str], tuple[str, float]]:  # fmt: skip
    return {
        ("sft", "ce"): ("SFT", sft),
        ("kd", "fkl"): ("KD", kd),
        ("seqkd", "ce"): ("SeqKD", seqkd),
        ("kd", "rkl"): ("RKL", rkl),
        ("kd", "fkl+rkl"): ("FKL+RKL", both),
        ("kd", "jsd"): ("JSD", jsd),
        ("kd", "akl"): ("AKL", akl),
        ("distill_lens", "rkl"): ("DistillLens", distill_lens),
    }


GPT2_XL = PaperModel(
    name="GPT-2 1.5B, fine-tuned", folder="teacher-gpt2-1.5B", blocks=48, width=1600
)
STUDENTS = (
    PaperStudent(
        model=PaperModel(name="GPT-2 base", folder="gpt2-base", blocks=12, width=768),
        pair="gpt2-base",
        averages=_averages(16.56, 17.20, 16.64, 17.56, 17.50, 17.20, 17.64, 21.12),
        teacher=GPT2_XL,
        teacher_average=23.52,
    ),
    PaperStudent(
        model=PaperModel(name="GPT-2 medium", folder="gpt2-medium", blocks=24, width=1024),
        pair="gpt2-medium",
        averages=_averages(20.58, 20.42, 21.04, 21.02, 20.82, 20.62, 20.64, 23.72),
        teacher=GPT2_XL,
        teacher_average=23.52,
    ),
    PaperStudent(
        model=PaperModel(name="TinyLlama", folder="TinyLlama-1.1B", blocks=22, width=2048),
        pair="tinyllama",
        averages=_averages(24.16, 23.82, 23.18, 24.00, 24.56, 24.44, 24.32, 25.48),
        teacher=PaperModel(
            name="Llama 7B, fine-tuned", folder="SFT-Llama-7B", blocks=32, width=4096
        ),
        teacher_average=26.56,
    ),
)


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """A method of ours that Table 1 has, too."""

    method: Method
    paper_name: str
    paper_average: float
    ours: Summary | None
    """Mean over the sets that are there; None where no seed has all of them."""
    differences: tuple[str, ...]
    """In what ours is not the paper's; empty where nothing is known to differ."""


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """What Table 1 says of a row."""

    name: str
    average: float
    model: PaperModel
    run: PaperRun | None
    """How it was trained; None of a teacher."""


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """Our averages beside the paper's; written by the writers of `tables`."""

    text_columns: ClassVar[tuple[int, ...]] = (0, 1, 5)
    rows: tuple[PaperRow, ...]

    @property
    def differences(self) -> list[str]:
        """All that differs in any row, each thing once; a row tells their numbers, from 1."""
        return list(dict.fromkeys(thing for row in self.rows for thing in row.differences))

    def header(self) -> list[str]:
        """Returns the column titles."""
        return ["method", "row of the paper", "paper", "ours", "n", "what differs"]

    def lines(self) -> list[list[str]]:
        """Returns the formatted cells, a list per row, as long as the header."""
        numbers = {thing: at for at, thing in enumerate(self.differences, start=1)}
        return [
            [
                row.method.label,
                row.paper_name,
                f"{row.paper_average:.2f}",
                MISSING if row.ours is None else row.ours.format(),
                "0" if row.ours is None else str(row.ours.n),
                _ranges([numbers[thing] for thing in row.differences]) or "nothing known",
            ]
            for row in self.rows
        ]


def _ranges(numbers: Iterable[int]) -> str:
    """Returns numbers in order, those that follow each other as a range: ``1–3, 5``."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][-1] == number - 1:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    return ", ".join(f"{r[0]}–{r[-1]}" if len(r) > 1 else str(r[0]) for r in ranges)


def build_paper_table(methods: Sequence[Method]) -> PaperTable:
    """Returns the methods that Table 1 has, by their folders CKPT/APPROACH/TYPE."""
    rows = []
    for method in methods:
        entry = _find_row(method.scores[0].method_folder)
        if entry is not None:
            sets = [name for name in PROMPTS if name in method.test_sets]
            rows.append(
                PaperRow(
                    method=method,
                    paper_name=entry.name,
                    paper_average=entry.average,
                    ours=_our_average(method, sets),
                    differences=tuple(_differences(method, sets, entry)),
                )
            )
    return PaperTable(rows=tuple(rows))


def _find_row(folder: Path) -> _Entry | None:
    """Returns what the paper says of …/CKPT/APPROACH/TYPE."""
    if len(folder.parts) < 3:
        return None
    checkpoint, approach, kind = folder.parts[-3:]
    for student in STUDENTS:
        if student.model.folder != checkpoint:
            continue
        name, teacher = student.model.name, student.teacher
        if (approach, kind) == ("given", teacher.folder):
            average = student.teacher_average
            return _Entry(name=f"{name}: teacher", average=average, model=teacher, run=None)
        if (approach, kind) in student.averages:
            row, average = student.averages[approach, kind]
            run = PaperRun(
                pair=student.pair, approach=approach, kind=kind, teacher_blocks=teacher.blocks
            )
            return _Entry(name=f"{name}: {row}", average=average, model=student.model, run=run)
    return None


def _our_average(method: Method, sets: Sequence[str]) -> Summary | None:
    return build_table([method], metric=METRIC, sets=sets).rows[0].average if sets else None


def _differences(method: Method, sets: Sequence[str], entry: _Entry) -> list[str]:
    """Returns what is known to differ from the paper's, a phrase for each thing."""
    scores = [score for score in method.scores if score.test_set in sets]
    missing = [name for name in PROMPTS if name not in sets]
    found = []
    if missing:
        found.append(f"{len(sets)} of 5 sets, without {', '.join(missing)}")
    for name in sets:
        counts = sorted({score.num_prompts for score in scores if score.test_set == name})
        if counts != [PROMPTS[name]]:
            told = " or ".join(f"{count:,}" for count in counts)
            found.append(f"{name}: {told} of {PROMPTS[name]:,} prompts")
    found += _seed_differences(method, scores)
    for key, wanted in SETTINGS.items():
        values = {json.dumps(score.settings.get(key)) for score in scores}
        if any(json.loads(value) != wanted for value in values):
            told = ", ".join(sorted(values)).replace("null", "not recorded")
            found.append(f"{key}: {told} for {json.dumps(wanted)}")
    found += _model_differences(scores, entry.model)
    if entry.run is None:
        return [*found, "how the teacher was trained is not compared"]
    checkpoints = sorted({Path(score.checkpoint) for score in scores})
    trained = [thing for one in checkpoints for thing in training_differences(one, entry.run)]
    return [*found, *dict.fromkeys(trained)]


def _seed_differences(method: Method, scores: Sequence[Score]) -> list[str]:
    found = []
    drawn: dict[tuple[str, int | None], set[int]] = {}
    for score in scores:
        seeds = drawn.setdefault((score.test_set, score.training_seed), set())
        seeds.add(score.sampling_seed)
    unlike = {tuple(sorted(seeds)) for seeds in drawn.values()} - {SAMPLING_SEEDS}
    if unlike:
        told = " or ".join(" ".join(map(str, seeds)) for seeds in sorted(unlike))
        found.append(f"sampling seeds {told} for {' '.join(map(str, SAMPLING_SEEDS))}")
    if method.by_training:
        trainings = len({score.training_seed for score in scores})
        found.append(f"{trainings} training seeds for one")
    return found


def _model_differences(scores: Sequence[Score], model: PaperModel) -> list[str]:
    """Compares the size of what was scored with the paper's model, where its folder is there."""
    found = []
    for checkpoint in sorted({score.checkpoint for score in scores}):
        size = _model_size(Path(checkpoint) / "config.json")
        if size is None:
            found.append(f"model not checked: {checkpoint or 'checkpoint'}/config.json is not here")
        elif size != (model.blocks, model.width):
            found.append(
                f"another model: {size[0]} blocks of width {size[1]}, {model.name} has "
                f"{model.blocks} of {model.width}"
            )
    return list(dict.fromkeys(found))


def _model_size(file: Path) -> tuple[int, int] | None:
    """Returns blocks and width in a GPT-2's or Llama's config.json; None without such a file."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.get("model_type") == "gpt2":
            return int(config["n_layer"]), int(config["n_embd"])
        return int(config["num_hidden_layers"]), int(config["hidden_size"])
    except (OSError, AttributeError, KeyError, TypeError, ValueError):
        return None


def paper_notes(table: PaperTable) -> list[str]:
    """Returns what a reader must know of the table."""
    if not table.rows:
        return []
    return [
        f"paper: Rouge-L, mean of five sets and five sampling seeds, {CITATION}; measured there.",
        "ours: the mean over those of the five sets that were scored, ± the sample standard "
        "deviation over n seeds. Where anything differs, the two do not compare.",
        f"Training is compared by {FACTS_FILE} beside the weights, with configs/paper; what "
        "differs from the published code on purpose is in docs/reproduce.md and not told again.",
        "The published spread of one method over five sampling seeds is about ±0.4: one seed shows "
        "nothing under 0.5.",
    ]
