"""The vLLM back end against a stand-in that keeps to vLLM's documented interface; no GPU here."""

from __future__ import annotations

import importlib
import importlib.machinery
import inspect
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, PreTrainedTokenizerFast

from distilllens.config import EvalConfig, EvaluateConfig
from distilllens.errors import ConfigError
from distilllens.evaluation.cells.provenance import identity
from distilllens.evaluation.generation import Answer
from distilllens.evaluation.vllm import backend as vllm_backend

ROWS = 320
"""Of the stand-in's head; the tokenizer has 300 tokens."""
SETTINGS = EvalConfig(do_sample=False, max_new_tokens=9, no_repeat_ngram_size=2)
CONFIG = EvaluateConfig(backend="vllm", checkpoint="folder", eval=SETTINGS, max_prompt_length=60)
PROMPTS = ["a", "one two three", "Response:"]


class AdapterLogitsProcessor:
    """vLLM's base class: hands a request's rules its prompt and its running output."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self.requests: dict[int, Any] = {}

    def add(self, place: int, params: Any, prompt_ids: list[int], output_ids: list[int]) -> None:
        rules = self.new_req_logits_processor(params)  # type: ignore[attr-defined]
        assert len(inspect.signature(rules).parameters) == 3
        self.requests[place] = partial(rules, prompt_ids, output_ids)


class SamplingParams:
    """Refuses what vLLM refuses."""

    def __init__(self, **options: Any) -> None:
        known = {"temperature", "top_p", "top_k", "max_tokens", "stop_token_ids", "seed"}
        assert set(options) <= known | {"detokenize", "extra_args"}
        assert options["top_k"] == -1 or options["top_k"] >= 1
        assert -(2**63) <= options["seed"] < 2**63
        vars(self).update(options)


class LLM:
    """A model whose logits depend on the last token only: it wants to repeat itself."""

    applies_rules = True
    made: list[LLM] = []  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.calls: list[tuple[list[Any], list[Any]]] = []
        LLM.made.append(self)

    def generate(self, prompts: list[Any], params: list[Any], *, use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        self.calls.append((prompts, params))
        names = self.options["logits_processors"] if self.applies_rules else []
        classes = [getattr(importlib.import_module(n), c) for n, c in (x.split(":") for x in names)]
        processors = [one(None, torch.device("cpu"), False) for one in classes]
        results = []
        for place, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
            output: list[int] = []
            for processor in processors:
                processor.add(place, wanted, prompt["prompt_token_ids"], output)
            while len(output) < wanted.max_tokens:
                last = [*prompt["prompt_token_ids"], *output][-1]
                logits = -torch.arange(ROWS).float()
                logits[[5, 6]] = torch.tensor([9.0, 8.0]) if last != 5 else torch.tensor([8.0, 9.0])
                logits[0] = -900.0
                logits[310] = 7.0  # stands for no token
                for processor in processors:
                    assert not processor.is_argmax_invariant()
                    logits = processor.requests[place](logits)
                output.append(int(logits.argmax()))
                if output[-1] in wanted.stop_token_ids:
                    break
            results.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(output))]))
        return results


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[LLM]]:
    """A stand-in for the package, as far as it is used; and the folder of a model's config."""
    GPT2Config(n_positions=1024).save_pretrained(tmp_path / "folder")
    monkeypatch.chdir(tmp_path)
    package: Any = ModuleType("vllm")
    package.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    package.LLM, package.SamplingParams = LLM, SamplingParams
    processors: Any = ModuleType("vllm.v1.sample.logits_processor")
    processors.AdapterLogitsProcessor = AdapterLogitsProcessor
    monkeypatch.setitem(sys.modules, "vllm", package)
    for name in ("vllm.v1", "vllm.v1.sample"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, processors.__name__, processors)
    monkeypatch.delitem(sys.modules, "distilllens.evaluation.vllm.rules", raising=False)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    LLM.made.clear()
    yield LLM
    sys.modules.pop("distilllens.evaluation.vllm.rules", None)


def answers(tokenizer: PreTrainedTokenizerFast, **options: Any) -> list[Answer]:
    return vllm_backend.generate_answers(
        vllm_backend.VllmModel(CONFIG),
        tokenizer,
        PROMPTS,
        seed=10,
        max_prompt_length=60,
        **{"settings": SETTINGS, **options},
    )


def test_rules_hold_and_answers_come_in_order(
    vllm: type[LLM], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    told: list[int] = []
    counts: list[int] = []
    found = answers(
        tiny_tokenizer, progress=counts.append, on_answer=lambda place, _: told.append(place)
    )
    assert (told, counts) == ([0, 1, 2], [3])
    # 5 6 5, then neither 6 (5 6 is there) nor a row without a token, but the next best.
    ids = tiny_tokenizer(PROMPTS[0])["input_ids"]
    pairs = list(zip([*ids, 5, 6, 5], [5, 6, 5, 1], strict=False))
    text = str(tiny_tokenizer.decode([5, 6, 5], skip_special_tokens=True))
    assert len(set(pairs)) == len(pairs)
    assert found[0].text.startswith(text)
    assert all(answer.num_tokens == 9 and answer.truncated for answer in found)


def test_what_vllm_is_told(vllm: type[LLM], tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sampled = replace(SETTINGS, do_sample=True, temperature=0.7, top_k=0, top_p=0.9)
    answers(tiny_tokenizer, settings=sampled)
    answers(tiny_tokenizer, indices=[2, 1, 0])
    first, second = vllm.made
    assert first.options["max_model_len"] == 69
    GPT2Config(n_positions=64).save_pretrained("folder")
    answers(tiny_tokenizer)
    assert vllm.made[-1].options["max_model_len"] == 64  # no more than there are positions
    assert first.options["generation_config"] == "vllm"
    params = first.calls[0][1]
    assert {(p.temperature, p.top_p, p.top_k) for p in params} == {(0.7, 0.9, -1)}
    seeds = [p.seed for p in params]
    assert len(set(seeds)) == 3
    assert [p.seed for p in second.calls[0][1]] == seeds[::-1]  # of the place in the whole set
    assert second.calls[0][1][0].temperature == 0.0  # greedy


@pytest.mark.parametrize(
    ("size", "what"), [(2, "repeated 2 tokens"), (0, "a row of the head that stands for no token")]
)
def test_a_version_that_ignores_the_rules_is_an_error(
    size: int,
    what: str,
    vllm: type[LLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm, "applies_rules", False)
    settings = replace(SETTINGS, no_repeat_ngram_size=size)
    if size == 0:
        assert len(answers(tiny_tokenizer, settings=settings)) == 3  # nothing was broken
        monkeypatch.setattr(tiny_tokenizer, "get_vocab", lambda: {"a": 0, "b": 4})
    with pytest.raises(ConfigError, match=what) as caught:
        answers(tiny_tokenizer, settings=settings)
    assert "--backend transformers" in caught.value.fix


def test_missing_package_and_foreign_options_are_refused(
    vllm: type[LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="attention=eager is transformers'"):
        vllm_backend.check_vllm(replace(CONFIG, attention="eager"))
    monkeypatch.delitem(sys.modules, "vllm")
    with pytest.raises(ConfigError, match=r"backend=vllm needs vllm") as caught:
        vllm_backend.VllmModel(CONFIG)
    assert "bash scripts/setup.sh vllm" in caught.value.fix


def test_several_processes_are_refused(
    vllm: type[LLM], tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="runs in one process"):
        answers(tiny_tokenizer)
    assert vllm.made == []


def test_results_of_the_two_are_told_apart() -> None:
    ours = identity(replace(CONFIG, backend="transformers"), checkpoint="x", records=[])
    theirs = identity(CONFIG, checkpoint="x", records=[])
    assert {key for key in ours if ours[key] != theirs[key]} == {"backend"}
