"""What keeps scores from being compared like for like."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from distilllens.report.scores.load import WEIGHTS, Method, list_some

MADE_BY = {
    "similarity": "the model of the sentence similarity",
    "backend": "the back end of the generation",
    "dtype": "the precision of the weights",
    "teacher": "the teacher of the token metrics",
}
"""Of `Score.origin`: what should be the same everywhere, with its name for readers."""


def comparison_warnings(methods: Sequence[Method]) -> list[str]:
    """Returns what keeps the methods' figures from being like for like, one sentence each."""
    warnings = []
    for test_set in sorted({name for method in methods for name in method.test_sets}):
        scores = [s for m in methods for s in m.scores if s.test_set == test_set]
        counts = sorted({score.num_prompts for score in scores})
        records = {score.records for score in scores if score.records is not None}
        if len(counts) > 1:
            listed = ", ".join(str(count) for count in counts)
            warnings.append(f"{test_set}: not the same number of prompts everywhere ({listed})")
        elif len(records) > 1:
            warnings.append(f"{test_set}: not the same prompts or references everywhere")
    settings = [score.settings for method in methods for score in method.scores]
    keys = sorted({key for setting in settings for key in setting})
    for key in keys:
        values = {json.dumps(setting.get(key), sort_keys=True) for setting in settings}
        if len(values) > 1:
            warnings.append(f"generation setting {key} differs: {', '.join(sorted(values))}")
    return warnings + _origin_warnings(methods)


def _origin_warnings(methods: Sequence[Method]) -> list[str]:
    """Returns where one figure is of several models, and what did not make all figures alike."""
    warnings = []
    for method in methods:
        by_training: dict[int | None, dict[str, Path]] = defaultdict(dict)
        for score in method.scores:
            if WEIGHTS in score.origin:
                by_training[score.training_seed].setdefault(score.origin[WEIGHTS], score.file)
        for files in by_training.values():
            if len(files) > 1:
                listed = list_some(str(file) for file in files.values())
                warnings.append(
                    f"{method.label}: its seeds are of {len(files)} different models, so their "
                    f"mean is of none of them: {listed}"
                )
    for key, name in MADE_BY.items():
        makers: dict[str, dict[str, None]] = defaultdict(dict)
        for method in methods:
            for score in method.scores:
                if key in score.origin:
                    makers[score.origin[key]][method.label] = None
        if len(makers) > 1:
            told = "; ".join(f"{maker} ({list_some(makers[maker])})" for maker in sorted(makers))
            warnings.append(f"{name} differs: {told}")
    return warnings
