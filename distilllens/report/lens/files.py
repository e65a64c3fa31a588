"""A lens report's numbers as JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from distilllens.lens_matrix import LensMap
from distilllens.public import public_path
from distilllens.report.lens.readings import LensReadings
from distilllens.report.lens.statistics import STATISTICS, statistics_rows
from distilllens.report.lens.study import Study
from distilllens.report.lens.token_map import SampleReadings, counterpart_table
from distilllens.report.lens_map import lens_map_csv

FORMAT = 1
"""Of lens.json; a reader should refuse others."""
PROBABILITY_UNIT = 10_000
"""Probabilities of token maps are whole numbers of 1/10000, which keeps the page small."""


def study_document(study: Study) -> dict[str, Any]:
    """Returns all numbers as JSON values; the page draws from the same document, which is shared:
    paths are as `public_path` gives them.

    Layers count from 1 everywhere; a list over layers begins with the first block. In ``samples``
    a token is its place in ``tokens``, entropies are in nats to three decimals, probabilities in
    1/10000, and ``rank`` is that of the answer's token (1: the likeliest).
    """
    table = _TokenTable(study)
    depths = [model.num_layers for model in study.models]
    return {
        "format": FORMAT,
        "models": [
            {
                "role": model.role,
                "label": model.label,
                "path": public_path(model.path),
                "layers": model.num_layers,
                "head_rows": model.vocab_rows,
                "statistics": {
                    key: [_exact(value) for value in values]
                    for key, values in model.statistics.items()
                },
            }
            for model in study.models
        ],
        "statistics": [
            {
                "key": statistic.key,
                "title": statistic.title,
                "unit": statistic.unit,
                "scale": statistic.scale,
            }
            for statistic in STATISTICS
        ],
        "data": {
            "file": public_path(str(study.settings.data)),
            "records": study.held_out.num_records,
            "left_out": study.held_out.num_left_out,
            "tokens": study.after.num_tokens,
            "tokens_available": study.after.num_available,
            "vocabulary": study.vocabulary,
        },
        "pairs": [[pair.teacher, pair.student] for pair in study.pairs],
        "counterparts": counterpart_table(depths, study.pairs),
        "divergence": {
            when: None if lens_map is None else _matrix(lens_map)
            for when, lens_map in (("before", study.before), ("after", study.after))
        },
        "samples": [table.sample(shown) for shown in study.samples],
        "tokens": table.shown,
        "probability_unit": PROBABILITY_UNIT,
    }


class _TokenTable:
    """Writes samples with places in one list of shown tokens instead of the tokens themselves."""

    def __init__(self, study: Study) -> None:
        self.text_of, self.shown, self.places = study.text_of, list[str](), dict[int, int]()

    def place(self, index: int) -> int:
        if index not in self.places:
            self.places[index] = len(self.shown)
            self.shown.append(self.text_of(index))
        return self.places[index]

    def sample(self, shown: SampleReadings) -> dict[str, Any]:
        sample = shown.sample
        return {
            "title": sample.title,
            "prompt": sample.prompt,
            "answered_by": sample.answered_by,
            "cut": sample.cut,
            "text": shown.answer,
            "answer": [self.place(index) for index in sample.response_ids],
            "maps": [self._map(readings) for readings in shown.readings],
        }

    def _map(self, readings: LensReadings) -> dict[str, Any]:
        units = np.rint(readings.prob_LNK * PROBABILITY_UNIT).astype(np.int64)
        gold = np.rint(np.exp(-readings.nll_LN) * PROBABILITY_UNIT).astype(np.int64)
        return {
            "entropy": np.round(readings.entropy_LN, 3).tolist(),
            "rank": readings.rank_LN.tolist(),
            "probability": gold.tolist(),
            "top": [
                [[self.place(int(index)) for index in top_K] for top_K in top_NK]
                for top_NK in readings.top_LNK
            ],
            "top_probability": units.tolist(),
        }


def _matrix(lens_map: LensMap) -> list[list[float]]:
    """Returns rows of student layers, each over teacher layers, in nats."""
    return [[_exact(value) for value in row] for row in lens_map.divergence_ST]


def _exact(value: float) -> float:
    """Keeps seven digits: float32, in which the numbers were computed, has no more."""
    return float(f"{value:.7g}")


def layers_csv(study: Study) -> str:
    """Returns model, layer, depth and every statistic, a line per layer."""
    names = [statistic.key for statistic in STATISTICS]
    units = {"entropy": "entropy_nats", "nll": "nll_nats"}
    rows = statistics_rows(
        [model.role for model in study.models], [model.statistics for model in study.models]
    )
    return _csv(
        ["model", "layer", "depth", *(units.get(name, name) for name in names)],
        ([role, layer, repr(depth), *map(repr, values)] for role, layer, depth, values in rows),
    )


def divergence_csv(study: Study) -> str:
    """Returns student_layer, teacher_layer and the divergence after training, before if known."""
    if study.before is not None:
        return lens_map_csv(study.before, study.after)
    cells = np.ndenumerate(study.after.divergence_ST)
    return _csv(
        ["student_layer", "teacher_layer", "jsd_nats"],
        ([s + 1, t + 1, repr(float(value))] for (s, t), value in cells),
    )


def tokens_csv(study: Study) -> str:
    """Returns a line per answer, token, model and layer: entropy, gold token, five likeliest."""
    top = study.samples[0].readings[0].top_LNK.shape[-1] if study.samples else 0
    header = ["sample", "title", "position", "token", "model", "layer", "entropy_nats"]
    header += ["gold_rank", "gold_nll_nats"]
    for number in range(1, top + 1):
        header += [f"top{number}", f"top{number}_probability"]
    return _csv(header, _token_lines(study))


def _token_lines(study: Study) -> Iterable[list[Any]]:
    for number, shown in enumerate(study.samples, start=1):
        for model, readings in zip(study.models, shown.readings, strict=True):
            for layer, token in np.ndindex(readings.entropy_LN.shape):
                line: list[Any] = [number, shown.sample.title, token + 1]
                line += [study.text_of(int(readings.gold_N[token])), model.role, layer + 1]
                line += [repr(float(readings.entropy_LN[layer, token]))]
                line += [int(readings.rank_LN[layer, token])]
                line += [repr(float(readings.nll_LN[layer, token]))]
                for index, probability in zip(
                    readings.top_LNK[layer, token], readings.prob_LNK[layer, token], strict=True
                ):
                    line += [study.text_of(int(index)), repr(float(probability))]
                yield line


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()
