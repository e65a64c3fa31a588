"""The state of all random generators of a process, as tensors."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_state() -> dict[str, Tensor]:
    """Returns the state of every generator of this process as tensors."""
    _, python_words, python_gauss = random.getstate()
    numpy_state: dict[str, Any] = dict(np.random.get_state(legacy=False))
    counters = [numpy_state["state"]["pos"], numpy_state["has_gauss"]]
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(python_words),
        "python_gauss": torch.tensor(
            [] if python_gauss is None else [python_gauss], dtype=torch.float64
        ),
        "numpy": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
        "numpy_counters": torch.tensor(counters),
        "numpy_gauss": torch.tensor(numpy_state["gauss"], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Puts the generators of this process back to what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = state["numpy_counters"].tolist()
    numpy_state = {"key": state["numpy"].numpy().astype(np.uint32), "pos": position}
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": numpy_state,
            "has_gauss": has_gauss,
            "gauss": state["numpy_gauss"].item(),
        }
    )
    if device.type == "cuda" and "cuda" in state:  # a CPU saved none
        torch.cuda.set_rng_state(state["cuda"], device)


def seed_new_rank(seed: int, rank: int, step: int) -> None:
    """Seeds the generators of a process that was not there when a state was saved."""
    number = int(np.random.SeedSequence([seed, rank, step]).generate_state(1)[0])
    torch.manual_seed(number)  # CUDA's too
    random.seed(number)
    np.random.seed(number)
