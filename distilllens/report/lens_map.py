"""The lens map as numbers: CSV of what `lens_matrix` computes.

Shapes: S student layers, T teacher layers.
"""

from __future__ import annotations

import csv
import io

import numpy as np

from distilllens.lens_matrix import LensMap


def lens_map_csv(before: LensMap, after: LensMap) -> str:
    """Returns the numbers of two maps: student_layer, teacher_layer, jsd before and after."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["student_layer", "teacher_layer", "jsd_before_nats", "jsd_after_nats"])
    for (s, t), value in np.ndenumerate(before.divergence_ST):
        writer.writerow([s + 1, t + 1, repr(float(value)), repr(float(after.divergence_ST[s, t]))])
    return buffer.getvalue()


def entropy_csv(before: LensMap, after: LensMap) -> str:
    """Returns the entropies of all layers: model, layer, entropy in nats."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["model", "layer", "entropy_nats"])
    for model, entropies in (
        ("teacher", after.teacher_entropy_T),
        ("student before", before.student_entropy_S),
        ("student after", after.student_entropy_S),
    ):
        for layer, entropy in enumerate(entropies, start=1):
            writer.writerow([model, layer, repr(float(entropy))])
    return buffer.getvalue()
