"""Answers do not depend on the batch, end at EOS, and leave model and tokenizer as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from distilllens.config import EvalConfig
from distilllens.errors import ConfigError, NumericsError
from distilllens.evaluation.decoding.fast_linear import fast_linears
from distilllens.evaluation.generation import (
    Answer,
    cut_at_eos,
    decode_answer,
    generate_answers,
)

Factory = Callable[..., PreTrainedModel]

PROMPTS = [
    "Sort the words: pear, apple, fig.",
    "a",
    "The quick brown fox.\n\n### Response:\n",
    "Below is an instruction that describes a task. Write a response.",
    "?",
    "one two three",
    "Response: The answer is",
    "İ 你好",
    "The answer is apple, fig, pear. The answer is",
    "x y z",
]
GREEDY = EvalConfig(do_sample=False, max_new_tokens=24, batch_size=8)
SAMPLED = EvalConfig(max_new_tokens=24, batch_size=8)


@pytest.fixture(params=["tiny_gpt2", "tiny_llama", "tiny_qwen2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A tiny model of each family, with weights large enough that context decides the argmax."""
    build: Factory = request.getfixturevalue(request.param)
    return enlarge(build())


@pytest.fixture
def gpt2(tiny_gpt2: Factory) -> PreTrainedModel:
    return enlarge(tiny_gpt2())


def enlarge(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    settings: EvalConfig,
    *,
    seed: int = 10,
    prompts: list[str] = PROMPTS,
    indices: list[int] | None = None,
) -> list[Answer]:
    return generate_answers(
        model,
        tokenizer,
        prompts,
        settings=settings,
        seed=seed,
        max_prompt_length=100,
        indices=indices,
    )


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_batch_of_one_equals_batch_of_eight(
    model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, settings: EvalConfig
) -> None:
    together = answers(model, tiny_tokenizer, settings)
    alone = answers(model, tiny_tokenizer, replace(settings, batch_size=1))
    assert together == alone
    assert len({answer.text for answer in together}) > 5  # the prompts do matter


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_batch_size_does_not_matter_on_cuda(
    model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, settings: EvalConfig
) -> None:
    module: torch.nn.Module = model
    module.cuda()
    together = answers(model, tiny_tokenizer, settings)
    assert together == answers(model, tiny_tokenizer, replace(settings, batch_size=1))


def test_positions_of_a_padded_prompt_matter_to_gpt2(
    gpt2: Any, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The control of the test above: with positions that count padding the tokens are others."""
    ids = tiny_tokenizer(PROMPTS[0])["input_ids"]
    inputs = torch.tensor([[0] * 20 + ids])
    mask = torch.tensor([[0] * 20 + [1] * len(ids)])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    right = gpt2.generate(inputs, attention_mask=mask, **options)
    counted = torch.arange(inputs.shape[1])[None]
    wrong = gpt2.generate(inputs, attention_mask=mask, position_ids=counted, **options)
    assert right.tolist() != wrong.tolist()


def test_greedy_tokens_are_those_of_single_forward_passes(
    model: Any, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The oracle knows no cache, no padding and no generate."""
    settings = replace(GREEDY, no_repeat_ngram_size=0)
    for prompt, answer in zip(PROMPTS, answers(model, tiny_tokenizer, settings), strict=True):
        ids = tiny_tokenizer(prompt)["input_ids"]
        new: list[int] = []
        while len(new) < settings.max_new_tokens:
            with torch.no_grad():
                token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
            if token == tiny_tokenizer.eos_token_id:
                break
            new.append(token)
        assert answer.text == tiny_tokenizer.decode(new, skip_special_tokens=True)
        assert answer.num_tokens == len(new)


def test_seeds_reproduce_and_differ(
    gpt2: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    first = answers(gpt2, tiny_tokenizer, SAMPLED, seed=10)
    assert first == answers(gpt2, tiny_tokenizer, SAMPLED, seed=10)
    other = answers(gpt2, tiny_tokenizer, SAMPLED, seed=20)
    assert sum(a != b for a, b in zip(first, other, strict=True)) >= 8


def test_a_share_of_the_prompts_gets_the_answers_of_the_whole(
    gpt2: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    whole = answers(gpt2, tiny_tokenizer, SAMPLED)
    odd = list(range(1, len(PROMPTS), 2))
    share = answers(gpt2, tiny_tokenizer, SAMPLED, prompts=PROMPTS[1::2], indices=odd)
    assert share == whole[1::2]


def test_ngram_rule_is_the_librarys_on_prompts_without_padding(
    gpt2: Any, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    settings = replace(GREEDY, no_repeat_ngram_size=2, max_new_tokens=60)
    found = [answer.text for answer in answers(gpt2, tiny_tokenizer, settings)]
    free = replace(settings, no_repeat_ngram_size=0)
    assert found != [answer.text for answer in answers(gpt2, tiny_tokenizer, free)]
    for prompt, text in zip(PROMPTS, found, strict=True):
        ids = tiny_tokenizer(prompt, return_tensors="pt")
        output = gpt2.generate(
            **ids, max_new_tokens=60, do_sample=False, no_repeat_ngram_size=2, pad_token_id=0
        )
        new = output[0, ids["input_ids"].shape[1] :]
        assert text == tiny_tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([5, 6, 0, 7, 0], ([5, 6], False)),
        ([5, 6], ([5, 6], True)),
        ([0, 5], ([], False)),
        ([], ([], True)),
    ],
)
def test_cut_at_eos(ids: list[int], expected: tuple[list[int], bool]) -> None:
    assert cut_at_eos(ids, 0) == expected


def test_text_after_eos_never_leaks(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    yes, leak = (tiny_tokenizer(text)["input_ids"] for text in ("yes", "leak"))
    found = [
        decode_answer(tiny_tokenizer, ids, 0)
        for ids in ([*yes, 0, *leak], [*leak, *yes, 0], [0, *yes], [*yes])
    ]
    assert [answer.text for answer in found] == ["yes", "leakyes", "", "yes"]
    assert [answer.num_tokens for answer in found] == [*map(len, (yes, leak + yes, [], yes))]
    assert [answer.truncated for answer in found] == [False, False, False, True]


def test_answers_that_end_by_length_are_truncated_and_others_are_not(
    tiny_gpt2: Factory, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    # Weights near zero: every token has 1 chance in 300, so EOS ends a good share of answers.
    found = answers(
        tiny_gpt2(), tiny_tokenizer, replace(SAMPLED, max_new_tokens=60), prompts=PROMPTS[1:] * 5
    )
    lengths = {answer.truncated: set[int]() for answer in found}
    for answer in found:
        lengths[answer.truncated].add(answer.num_tokens)
    assert lengths[True] == {60}
    assert len(lengths[False]) > 1
    assert max(lengths[False]) < 60
    assert not any("endoftext" in answer.text for answer in found)


def test_the_checkpoints_own_generation_config_has_no_say(
    gpt2: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    expected = answers(gpt2, tiny_tokenizer, GREEDY)
    own = GenerationConfig(
        do_sample=True, temperature=3.0, repetition_penalty=5.0, suppress_tokens=[5], min_length=99
    )
    gpt2.generation_config = own
    assert answers(gpt2, tiny_tokenizer, GREEDY) == expected
    assert gpt2.generation_config is own


@pytest.fixture
def untouched(tiny_tokenizer: PreTrainedTokenizerFast) -> Iterator[None]:
    before = (tiny_tokenizer.padding_side, tiny_tokenizer.pad_token, len(tiny_tokenizer))
    yield
    assert before == (tiny_tokenizer.padding_side, tiny_tokenizer.pad_token, len(tiny_tokenizer))


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("training", [True, False])
def test_mode_random_state_and_tokenizer_are_left_alone(
    gpt2: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, training: bool
) -> None:
    expected = answers(gpt2.eval(), tiny_tokenizer, SAMPLED)
    gpt2.train(training)
    gpt2.config.use_cache = False  # as a trainer with gradient checkpointing sets it
    state = torch.get_rng_state()
    assert answers(gpt2, tiny_tokenizer, SAMPLED) == expected  # no dropout while generating
    assert gpt2.training is training
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_of_the_head_beyond_the_tokenizer_are_not_generated(
    tiny_gpt2: Factory, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    padded = tiny_gpt2(vocab=900)
    found = answers(padded, tiny_tokenizer, replace(SAMPLED, no_repeat_ngram_size=0))
    # Two thirds of the head stand for no token; each would have decoded to nothing.
    ids = [tiny_tokenizer(answer.text)["input_ids"] for answer in found]
    assert sum(map(len, ids)) > 0.8 * sum(answer.num_tokens for answer in found)


def test_no_prompts_give_no_answers(
    gpt2: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert answers(gpt2, tiny_tokenizer, GREEDY, prompts=[]) == []


def test_progress_counts_every_answer(
    gpt2: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    seen: list[int] = []
    told: list[tuple[int, Answer]] = []
    found = generate_answers(
        gpt2,
        tiny_tokenizer,
        PROMPTS,
        settings=GREEDY,
        seed=1,
        max_prompt_length=100,
        indices=range(50, 60),
        progress=seen.append,
        on_answer=lambda place, answer: told.append((place, answer)),
    )
    assert sum(seen) == len(PROMPTS)
    assert sorted(place for place, _ in told) == list(range(len(PROMPTS)))
    assert all(found[place] == answer for place, answer in told)


def test_an_answer_is_handed_over_before_longer_ones_end(
    tiny_gpt2: Factory, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    told: list[Answer] = []
    generate_answers(
        tiny_gpt2(),  # weights near zero: answers end by chance
        tiny_tokenizer,
        PROMPTS[1:] * 5,
        settings=replace(SAMPLED, max_new_tokens=60, batch_size=64),
        seed=10,
        max_prompt_length=100,
        on_answer=lambda _, answer: told.append(answer),
    )
    steps = [answer.num_tokens + (not answer.truncated) for answer in told]
    assert steps == sorted(steps)
    assert steps[0] < steps[-1] == 60


def test_a_model_in_training_can_go_on_training(
    tiny_gpt2: Factory, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model: Any = tiny_gpt2().train()
    forwards = {name: vars(module).get("forward") for name, module in model.named_modules()}
    answers(model, tiny_tokenizer, SAMPLED, prompts=["a"])
    assert model.training
    assert {name: vars(module).get("forward") for name, module in model.named_modules()} == forwards
    ids = torch.tensor([tiny_tokenizer("one two three")["input_ids"]])
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_linear_layers_by_onednn_give_the_same_logits(
    model: Any, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = torch.tensor([tiny_tokenizer(PROMPTS[0])["input_ids"]])
    layers = {type(module) for module in model.modules()} & {torch.nn.Linear, Conv1D}
    with torch.no_grad():
        expected = model(ids).logits
        with fast_linears(model):
            changed = {type(module) for module in model.modules() if "forward" in vars(module)}
            found = model(ids).logits
    assert changed == (layers if torch.backends.mkldnn.is_available() else set())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_context_window_is_respected(
    gpt2: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    longest = max(len(ids) for ids in tiny_tokenizer(PROMPTS)["input_ids"])
    fits = 128 - longest
    assert len(answers(gpt2, tiny_tokenizer, replace(GREEDY, max_new_tokens=fits))) == len(PROMPTS)
    with pytest.raises(ConfigError, match=rf"{longest} tokens.*={fits + 1} = 129 .* window 128"):
        answers(gpt2, tiny_tokenizer, replace(GREEDY, max_new_tokens=fits + 1))


def test_long_prompts_are_refused_not_cut(
    gpt2: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ConfigError, match=r"prompt 1 has .* over max_prompt_length=100"):
        answers(gpt2, tiny_tokenizer, GREEDY, prompts=["a", "word " * 101])


def test_a_model_that_is_not_finite_is_an_error(
    gpt2: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with torch.no_grad():
        next(gpt2.parameters())[3] = float("nan")
    with pytest.raises(NumericsError, match="not finite"):
        answers(gpt2, tiny_tokenizer, SAMPLED)


def test_a_tokenizer_without_eos_is_an_error(gpt2: PreTrainedModel) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ConfigError, match="no end-of-text token"):
        answers(gpt2, bare, GREEDY, prompts=["a"])
