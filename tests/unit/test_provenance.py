"""A checkpoint's fingerprint sees retraining, in large files too, and not names or times."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from distilllens.evaluation.cells.provenance import checkpoint_fingerprint, differences


def write_checkpoint(folder: Path, weight: torch.Tensor, config: str = "{}") -> str:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config)
    save_file({"weight": weight}, folder / "model.safetensors")
    return checkpoint_fingerprint(str(folder))


def test_large_weights_are_told_apart_by_a_sample(tmp_path: Path) -> None:
    weight = torch.randn(1_000_000)  # 4 MB: more than is read
    first = write_checkpoint(tmp_path / "a", weight)
    assert first == write_checkpoint(tmp_path / "b", weight)
    assert first != write_checkpoint(tmp_path / "c", weight * 1.0001)
    end = weight.clone()
    end[-1] += 1  # the last block is always read
    assert first != write_checkpoint(tmp_path / "d", end)


def test_config_and_tokenizer_count_and_times_do_not(tmp_path: Path) -> None:
    weight = torch.zeros(8)
    first = write_checkpoint(tmp_path / "a", weight)
    os.utime(tmp_path / "a" / "model.safetensors", (1, 1))
    assert checkpoint_fingerprint(str(tmp_path / "a")) == first
    assert first != write_checkpoint(tmp_path / "b", weight, config='{"x": 1}')
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    assert checkpoint_fingerprint(str(tmp_path / "a")) != first


def test_a_hub_model_is_its_name_and_revision() -> None:
    main = checkpoint_fingerprint("owner/model")
    assert main == "hub:owner/model@default branch"
    assert checkpoint_fingerprint("owner/model", "abc") != main


def test_differences_name_what_differs() -> None:
    stored, wanted = {"same": 1, "eval.top_k": 0, "old": True}, {"same": 1, "eval.top_k": 50}
    assert differences(stored, wanted) == [
        "eval.top_k: 0 there, 50 now",
        "old: True there, None now",
    ]
