"""What each run was: one row per setting, one column per run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from distilllens.config import CE_ONLY
from distilllens.report.runs.record import RunRecord
from distilllens.report.tables import MISSING


def run_rows(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Returns settings and outcome of the runs: name, and one value for each run."""
    columns = [_describe(run) for run in runs]
    return [
        (name, [column[name] for column in columns]) for name in (columns[0] if columns else {})
    ]


def runs_to_rich(runs: Sequence[RunRecord]) -> Table:
    """Returns the runs' outcome for a terminal: a row per run."""
    table = Table(title="Runs", title_justify="left")
    table.add_column("run", overflow="fold")
    shown = ("state", "steps", "best dev loss (nats/token)", "learning rate", "kd_ratio")
    for name in shown:
        table.add_column(name, justify="right")
    for run in runs:
        description = _describe(run)
        table.add_row(run.label, *(description[name] for name in shown))
    return table


def _describe(run: RunRecord) -> dict[str, str]:
    config = run.config
    objective, optim = config.objective, config.optim
    ce_only = objective.approach in CE_ONLY
    has_lens = objective.approach == "distill_lens"
    lens = objective.lens
    best = run.best_dev()
    pairs = ", ".join(f"{pair.teacher}→{pair.student}" for pair in run.pairs)
    return {
        "folder": _from_here(run.folder),
        "state": str(run.status.get("state", MISSING)),
        "approach": objective.approach,
        "divergence": MISSING if ce_only else objective.divergence,
        "kd_ratio": MISSING if ce_only else f"{objective.kd_ratio:g}",
        "lens": f"{lens.coeff:g} × {lens.divergence}, norm {lens.norm}" if has_lens else MISSING,
        "layer pairs (teacher→student)": pairs or MISSING,
        "teacher": config.model.teacher or MISSING,
        "student": config.model.student,
        "data": config.data.path,
        "generated answers": config.data.generated or MISSING,
        "data fingerprint": _short(run.data.get("fingerprint")),
        "records": _counts(
            {k: v for k, v in run.data.items() if k not in ("fingerprint", "source")}
        ),
        "learning rate": f"{optim.lr:g} → {optim.lr_min:g}, {optim.schedule}",
        "batch": f"{optim.micro_batch_size} per process × {optim.accumulation} accumulated",
        "steps": str(run.num_steps) if run.lines else MISSING,
        "best dev loss (nats/token)": f"{best[1]:.4f} at step {best[0]}" if best else MISSING,
        "training seed": str(config.run.seed),
        "commit": _short(run.environment.get("git_commit")),
        "versions": _versions(run.environment.get("versions")),
    }


def _from_here(folder: Path) -> str:
    """Returns a path as a user in the current folder writes it."""
    here = Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def _short(value: object) -> str:
    """Returns the first 12 characters of a hash, with its -dirty mark."""
    text = str(value or "")
    dirty = "-dirty" if text.endswith("-dirty") else ""
    return text.removesuffix("-dirty")[:12] + dirty if text else MISSING


def _counts(counts: Mapping[str, object]) -> str:
    """Returns the counts of the prepared data; of a part (train, dev) those that matter here."""
    if not counts:
        return MISSING
    told = []
    for name, value in counts.items():
        if isinstance(value, Mapping):
            kept = ("used", "response_tokens")
            numbers = [f"{_number(value[k])} {k.replace('_', ' ')}" for k in kept if k in value]
            told.append(f"{name}: {', '.join(numbers)}")
        else:
            told.append(f"{name.replace('_', ' ')}: {_number(value)}")
    return "; ".join(told)


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _versions(versions: object) -> str:
    if not isinstance(versions, Mapping):
        return MISSING
    named = [
        f"{name} {versions[name]}"
        for name in ("torch", "transformers", "deepspeed")
        if name in versions
    ]
    return ", ".join(named) or MISSING
