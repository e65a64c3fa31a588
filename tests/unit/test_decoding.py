"""Rows that come and go decode what each would alone by transformers' own loop, in every family."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from model_zoo import FAMILIES, VOCAB, Size, build
from transformers import (
    GenerationConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    LogitsProcessorList,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from distilllens.config import EvalConfig
from distilllens.errors import ConfigError, NumericsError
from distilllens.evaluation.decoding import loop as decoding
from distilllens.evaluation.decoding.loop import ChoiceProcessor, Decoder, Request, can_select
from distilllens.evaluation.decoding.row_cache import can_hold
from distilllens.evaluation.decoding.sampling import RowRules, TokenChooser
from distilllens.evaluation.decoding.stores import LibraryStore, RowStore

EOS = 0
NEW = 16
GREEDY = EvalConfig(do_sample=False, max_new_tokens=NEW, no_repeat_ngram_size=3, batch_size=4)
SAMPLED = replace(GREEDY, do_sample=True, temperature=2.5)
SEEDS = range(100, 120)


def make_prompts(count: int, longest: int = 30) -> list[list[int]]:
    """Very different lengths, the shortest of one token."""
    source = random.Random(3)
    lengths = [1, longest, *(source.randint(1, longest) for _ in range(count - 2))]
    return [[source.randrange(1, VOCAB) for _ in range(length)] for length in lengths]


PROMPTS = make_prompts(14)


def decode(
    model: PreTrainedModel,
    settings: EvalConfig,
    prompts: Sequence[list[int]] = PROMPTS,
    *,
    order: Sequence[int] | None = None,
    eos_id: int = EOS,
) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    decoder = Decoder(
        model,
        settings=settings,
        num_tokens=VOCAB,
        eos_id=eos_id,
        on_end=lambda place, ids: found.update({place: ids}),
    )
    with torch.inference_mode():
        decoder.run(
            Request(place=place, prompt_ids=prompts[place], seed=SEEDS[place])
            for place in (order or range(len(prompts)))
        )
    assert sorted(found) == list(range(len(prompts)))
    return [found[place] for place in range(len(prompts))]


def oracle(
    model: Any, settings: EvalConfig, prompts: Sequence[list[int]] = PROMPTS, eos_id: int = EOS
) -> list[list[int]]:
    """Each prompt alone, without padding, by ``model.generate``."""
    model.generation_config = GenerationConfig()
    answers = []
    for place, prompt in enumerate(prompts):
        chooser = TokenChooser(settings, num_tokens=VOCAB, device=model.device)
        choice = ChoiceProcessor(chooser, [RowRules(settings, prompt, SEEDS[place])])
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            logits_processor=LogitsProcessorList([choice]),
            generation_config=GenerationConfig(
                max_new_tokens=settings.max_new_tokens, eos_token_id=eos_id, pad_token_id=eos_id
            ),
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def peaked(model: PreTrainedModel) -> PreTrainedModel:
    """Returns it with weights that make context, not chance, decide."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    return model


def with_window(model: PreTrainedModel, window: int) -> PreTrainedModel:
    """Narrows the sliding window to less than most prompts."""
    model.config.sliding_window = window
    for module in model.modules():
        if getattr(module, "sliding_window", None) is not None:
            module.sliding_window = window  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_decodes_what_its_rows_do_alone(family: str) -> None:
    model = peaked(build(family))
    expected = oracle(model, SAMPLED, PROMPTS[:7])
    assert decode(model, SAMPLED, PROMPTS[:7]) == expected
    assert len({tuple(ids) for ids in expected}) > 5  # the prompts do matter


WINDOWED = ["gemma2", "gemma3", "mistral"]
ATTENTION = [*WINDOWED, "gpt2", "llama", "qwen2", "gpt_neox", "opt-pre-norm"]


@pytest.mark.parametrize("family", ATTENTION)
def test_batches_and_their_order_change_nothing(family: str) -> None:
    model = peaked(build(family))
    if family in WINDOWED:
        with_window(model, 6)
    assert can_hold(model)
    for settings in (GREEDY, SAMPLED):
        expected = oracle(model, settings)
        for size in (1, 7, 32):
            assert decode(model, replace(settings, batch_size=size)) == expected
    order = list(range(len(PROMPTS)))
    random.Random(5).shuffle(order)
    assert decode(model, SAMPLED, order=order) == expected
    assert len({len(ids) for ids in expected}) > 2  # rows end at different times


@pytest.mark.parametrize("family", ["gemma3", "gpt2"])
def test_eager_attention_too(family: str) -> None:
    model = peaked(build(family))
    model.set_attn_implementation("eager")
    if family in WINDOWED:
        with_window(model, 6)
    assert decode(model, SAMPLED) == oracle(model, SAMPLED)


@pytest.mark.parametrize("family", WINDOWED)
def test_the_window_of_the_tests_above_does_bite(family: str) -> None:
    narrow, wide = (with_window(peaked(build(family)), size) for size in (6, 4096))
    assert oracle(narrow, GREEDY, PROMPTS[:4]) != oracle(wide, GREEDY, PROMPTS[:4])


def hybrid() -> PreTrainedModel:
    """Two layers with a convolution's state, one of attention."""
    torch.manual_seed(7)
    config = Lfm2Config(
        **Size().modern(), layer_types=["conv", "full_attention", "conv"], conv_L_cache=3
    )
    return peaked(Lfm2ForCausalLM(config).eval())


def mamba() -> PreTrainedModel:
    torch.manual_seed(7)
    config = MambaConfig(vocab_size=VOCAB, hidden_size=16, state_size=4, num_hidden_layers=2)
    return peaked(MambaForCausalLM(config).eval())


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_rows_leave_a_hybrid_cache(settings: EvalConfig) -> None:
    model = hybrid()
    assert not can_hold(model)
    assert can_select(model)
    expected = oracle(model, settings)
    for size in (1, 7):
        assert decode(model, replace(settings, batch_size=size)) == expected


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_cache_of_another_kind_keeps_its_rows_and_says_so(
    settings: EvalConfig, caplog: pytest.LogCaptureFixture
) -> None:
    model = mamba()
    assert not can_select(model)
    with caplog.at_level(logging.WARNING):
        found = decode(model, settings)
    assert found == oracle(model, settings)
    assert "MambaForCausalLM keeps its past in a form of its own" in caplog.text


def test_one_prompt_one_token_and_eos_at_once() -> None:
    model = peaked(build("llama"))
    one = replace(SAMPLED, max_new_tokens=1)
    assert decode(model, one) == oracle(model, one)
    assert decode(model, SAMPLED, PROMPTS[:1]) == oracle(model, SAMPLED, PROMPTS[:1])
    first = decode(model, GREEDY, PROMPTS[:1])[0][0]
    same = [PROMPTS[0]] * 9
    assert decode(model, GREEDY, same, eos_id=first) == [[first]] * 9  # all rows in the first step
    later = decode(model, GREEDY, same)[0][5]
    ends = decode(model, GREEDY, same, eos_id=later)
    assert ends == oracle(model, GREEDY, same, eos_id=later)
    assert ends[0][-1] == later
    assert decode(model, GREEDY, []) == []


def test_rows_join_while_others_run_and_columns_move_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = peaked(build("gpt2"))
    seen: list[tuple[int, int]] = []
    moves: list[int] = []
    whole, move = RowStore.prefill, decoding.RowStore.step

    def prefill(self: RowStore, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        seen.append((len(self._lengths), len(prompts)))
        return whole(self, prompts)

    def step(self: RowStore, tokens: Sequence[int]) -> torch.Tensor:
        before = self._end
        logits = move(self, tokens)
        moves.append(self._end - before)
        return logits

    monkeypatch.setattr(RowStore, "prefill", prefill)
    monkeypatch.setattr(RowStore, "step", step)
    settings = replace(SAMPLED, batch_size=4)
    assert decode(model, settings) == oracle(model, settings)
    assert seen[0] == (0, 4)
    assert any(running == 3 for running, _ in seen)
    assert min(moves) < 0 < max(moves)
    rows = sum(len(ids) for ids in oracle(model, settings))
    assert len(moves) < 0.6 * rows  # of several rows each


def test_batch_tokens_bound_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = peaked(build("llama"))
    sizes: list[int] = []
    original = RowStore.step

    def step(self: RowStore, tokens: Sequence[int]) -> torch.Tensor:
        sizes.append(len(tokens))
        return original(self, tokens)

    monkeypatch.setattr(RowStore, "step", step)
    settings = replace(SAMPLED, batch_tokens=3 * (30 + NEW))
    assert decode(model, settings) == oracle(model, settings)
    assert max(sizes) == 3
    sizes.clear()
    decode(model, replace(SAMPLED, batch_tokens=1))
    assert max(sizes) == 1


def out_of_memory_over(
    rows: int, monkeypatch: pytest.MonkeyPatch, store: Any, method: str
) -> list[int]:
    """Lets a store's method fail with more than so many rows; returns the sizes seen."""
    seen: list[int] = []
    original: Callable[..., torch.Tensor] = getattr(store, method)

    def call(self: Any, given: Sequence[Any]) -> torch.Tensor:
        seen.append(len(given))
        if len(given) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return original(self, given)

    monkeypatch.setattr(store, method, call)
    return seen


@pytest.mark.parametrize("method", ["prefill", "step", "keep"])
@pytest.mark.parametrize(("make", "store"), [(None, RowStore), (hybrid, LibraryStore)])
def test_too_little_memory_halves_the_batch(
    make: Callable[[], PreTrainedModel] | None,
    store: Any,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make() if make is not None else peaked(build("llama"))
    settings = replace(SAMPLED, batch_size=12)
    expected = oracle(model, settings)
    seen = out_of_memory_over(5, monkeypatch, store, method)
    with caplog.at_level(logging.WARNING):
        assert decode(model, settings) == expected
    assert max(seen[-3:]) <= 5
    text = r"out of memory with (\d+) rows of up to 46 tokens: going on with (\d+) tokens"
    rows, tokens = map(int, re.findall(text, caplog.text)[0])
    assert 6 <= rows <= 12
    assert tokens == rows * 46 // 2


@pytest.mark.parametrize("failing", range(1, 40, 3))
def test_memory_that_ends_late_changes_no_answer(
    failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After rows have ended, others stand in their places: in no order of length any more."""
    model = peaked(build("llama"))
    settings = replace(SAMPLED, batch_size=4)
    expected = oracle(model, settings)
    original, calls = RowStore.step, 0

    def step(self: RowStore, tokens: Sequence[int]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, tokens)

    monkeypatch.setattr(RowStore, "step", step)
    assert decode(model, settings) == expected


def test_not_even_one_row_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    out_of_memory_over(0, monkeypatch, RowStore, "step")
    with pytest.raises(ConfigError, match=r"not even one row of 46 tokens") as caught:
        decode(peaked(build("llama")), SAMPLED)
    assert caught.value.why == "CUDA out of memory. Tried to allocate 2 GiB."


def test_no_answer_of_a_model_that_is_not_finite_is_handed_over() -> None:
    model = peaked(build("llama"))
    with torch.no_grad():
        next(model.parameters())[PROMPTS[3][0]] = float("nan")
    with pytest.raises(NumericsError, match="not finite"):
        decode(model, replace(SAMPLED, max_new_tokens=1), PROMPTS[3:4])
