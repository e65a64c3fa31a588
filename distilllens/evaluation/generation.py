"""Answers of a model to prompts, in batches that do not change the answers.

Each example samples with its own generator (see `sampling`), and rows of a batch are padded on the
left, with positions that count real tokens only (see `stores`), so in float32 an answer depends
neither on the batch size nor on the other prompts; in bfloat16 the rounding does depend on them.
The process's global random state is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from distilllens.config import SamplingConfig
from distilllens.data.tokenize import encode_prompts
from distilllens.errors import ConfigError
from distilllens.evaluation.decoding.fast_linear import fast_linears
from distilllens.evaluation.decoding.loop import Decoder, Request
from distilllens.evaluation.decoding.sampling import example_seed


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One generated answer."""

    text: str
    """The text before the end-of-text token, special tokens left out."""
    num_tokens: int
    """Number of tokens, without the end-of-text token."""
    truncated: bool
    """True if the answer ended by length, without an end-of-text token."""
    ids: tuple[int, ...] = ()
    """The tokens themselves, without the end-of-text token."""


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    settings: SamplingConfig,
    seed: int,
    max_prompt_length: int,
    indices: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
    on_answer: Callable[[int, Answer], None] | None = None,
) -> list[Answer]:
    """Generates one answer to each prompt; model and tokenizer are left as they were.

    Args:
        model: A causal language model, on the device to use.
        tokenizer: Its tokenizer; it needs an end-of-text token, not a padding token.
        prompts: Complete prompts (with the template).
        settings: Sampling, n-gram rule, length and size of batches.
        seed: Sampling seed; with an example's index it fixes the example's random numbers.
        max_prompt_length: Longest prompt in tokens; drop longer ones before.
        indices: The prompts' places in the whole set, where this is a share of it; default 0, 1, …
        progress: Called with the number of answers that have come since the last call.
        on_answer: Called with a prompt's place in ``prompts`` and its answer as soon as that has
            ended, before ``progress``; answers do not come in the prompts' order.

    Returns:
        The answers in the order of the prompts.

    Raises:
        ConfigError: A prompt is over the limit, prompt and answer exceed the model's context
            window, the tokenizer has no end-of-text token, the model cannot generate, or not even
            one prompt at a time fits into the device's memory.
        NumericsError: The model's logits are not finite.
    """
    eos_id = get_eos_id(tokenizer)
    prompt_ids = encode_within(tokenizer, prompts, max_prompt_length)
    longest = max(map(len, prompt_ids), default=0)
    check_context_window(model.config, longest, settings.max_new_tokens)
    places = range(len(prompts)) if indices is None else indices
    answers: dict[int, Answer] = {}

    def end(place: int, new_ids: list[int]) -> None:
        answers[place] = decode_answer(tokenizer, new_ids, eos_id)
        if on_answer is not None:
            on_answer(place, answers[place])
        if progress is not None:
            progress(1)

    requests = [
        Request(place=place, prompt_ids=ids, seed=example_seed(seed, places[place]))
        for place, ids in enumerate(prompt_ids)
    ]
    with _evaluation_state(model), fast_linears(model):
        Decoder(
            model,
            settings=settings,
            num_tokens=max(tokenizer.get_vocab().values()) + 1,
            eos_id=eos_id,
            on_end=end,
        ).run(requests)
    return [answers[place] for place in range(len(prompts))]


def encode_within(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_prompt_length: int
) -> list[list[int]]:
    """Returns the prompts' tokens.

    Raises:
        ConfigError: A prompt has more than ``max_prompt_length``.
    """
    prompt_ids = [list(ids) for ids in encode_prompts(tokenizer, prompts)]
    lengths = [len(ids) for ids in prompt_ids]
    if any(length > max_prompt_length for length in lengths):
        place = lengths.index(max(lengths))
        raise ConfigError(
            f"prompt {place} has {max(lengths)} tokens, over max_prompt_length={max_prompt_length}",
            fix="drop long prompts first, or raise --max_prompt_length",
        )
    return prompt_ids


def check_context_window(
    config: PreTrainedConfig,
    prompt_length: int,
    max_new_tokens: int,
    *,
    section: str = "eval",
    prompt_key: str = "max_prompt_length",
) -> None:
    """Checks that a prompt and its answer fit into the model's positions.

    Args:
        config: The model's.
        prompt_length: Of the longest prompt, in tokens.
        max_new_tokens: Longest answer in tokens.
        section: Where that stands in the configuration.
        prompt_key: Where the prompts' limit stands.

    Raises:
        ConfigError: They do not; names the numbers.
    """
    window = getattr(config.get_text_config(), "max_position_embeddings", None)
    needed = prompt_length + max_new_tokens
    if window is not None and needed > window:
        raise ConfigError(
            f"the longest prompt ({prompt_length} tokens) + {section}.max_new_tokens="
            f"{max_new_tokens} = {needed} tokens exceed the model's context window {window}",
            why="there are no positions beyond the window",
            fix=f"--{section}.max_new_tokens {max(1, window - prompt_length)}, or a smaller "
            f"--{prompt_key}",
        )


def cut_at_eos(ids: Sequence[int], eos_id: int) -> tuple[list[int], bool]:
    """Returns the tokens before the first end-of-text token, and whether there was none."""
    tokens = list(ids)
    if eos_id in tokens:
        return tokens[: tokens.index(eos_id)], False
    return tokens, True


def decode_answer(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], eos_id: int) -> Answer:
    """Returns the answer that new tokens make; what stands behind the end-of-text token is cut."""
    kept, truncated = cut_at_eos(ids, eos_id)
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Answer(text=str(text), num_tokens=len(kept), truncated=truncated, ids=tuple(kept))


def get_eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the token that ends a text.

    Raises:
        ConfigError: The tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "the tokenizer has no end-of-text token",
            why="training ends every answer with it, and generation stops there",
            fix='set "eos_token" in the model folder\'s tokenizer_config.json',
        )
    return int(tokenizer.eos_token_id)


@contextmanager
def _evaluation_state(model: PreTrainedModel) -> Iterator[None]:
    """Puts the model in eval mode, with an empty generation config, no gradients; restores all.

    ``generate`` fills whatever its caller leaves open from the model's own generation config: a
    checkpoint's ``repetition_penalty`` (Qwen2.5: 1.1) would silently enter the protocol.
    """
    if not model.can_generate():
        raise ConfigError(f"{type(model).__name__} cannot generate text: no causal language model")
    was_training, own_config = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    # A model in training goes on afterwards: what it keeps of these forwards (rotary tables, say)
    # may enter a backward, which tensors of the inference mode may not.
    without_gradients = torch.no_grad() if was_training else torch.inference_mode()
    try:
        with without_gradients:
            yield
    finally:
        model.generation_config = own_config
        model.train(was_training)
