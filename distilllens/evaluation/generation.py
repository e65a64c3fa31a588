"""Answers of a model to prompts, in batches that do not change the answers.

Shapes: ``B`` rows of a batch, ``T`` tokens.

A batch is padded on the left, with an attention mask; from the mask ``generate`` of transformers 5
makes the position ids that count real tokens only, which models with learned positions (GPT-2)
need. Each example samples with its own generator (see `sampling`), so in float32 an answer depends
neither on the batch size nor on the other prompts; in bfloat16 the rounding does depend on them.
The process's global random state is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from distilllens.config import SamplingConfig
from distilllens.data.tokenize import encode_prompts
from distilllens.errors import ConfigError, NumericsError
from distilllens.evaluation.sampling import build_processors, example_seed


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
        settings: Sampling, n-gram rule, length and batch size.
        seed: Sampling seed; with an example's index it fixes the example's random numbers.
        max_prompt_length: Longest prompt in tokens; drop longer ones before.
        indices: The prompts' places in the whole set, where this is a share of it; default 0, 1, …
        progress: Called after each batch with the number of answers it brought.
        on_answer: Called with each answer, and before it its place in ``prompts``, as soon as the
            answer is there; before ``progress`` counts it.

    Returns:
        The answers in the order of the prompts.

    Raises:
        ConfigError: A prompt is over the limit, prompt and answer exceed the model's context
            window, or the tokenizer has no end-of-text token.
        NumericsError: The model's logits are not finite.
    """
    eos_id = _eos_id(tokenizer)
    prompt_ids = encode_prompts(tokenizer, prompts)
    lengths = [len(ids) for ids in prompt_ids]
    if any(length > max_prompt_length for length in lengths):
        place = lengths.index(max(lengths))
        raise ConfigError(
            f"prompt {place} has {max(lengths)} tokens, over max_prompt_length={max_prompt_length}",
            fix="drop long prompts first, or raise --max_prompt_length",
        )
    check_context_window(model.config, max(lengths, default=0), settings.max_new_tokens)
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    places = range(len(prompts)) if indices is None else indices
    answers: dict[int, Answer] = {}
    # Longest first: rows of a batch need little padding, and too little memory shows at once.
    order = sorted(range(len(prompts)), key=lambda row: -lengths[row])
    with _evaluation_state(model):
        for start in range(0, len(order), settings.batch_size):
            rows = order[start : start + settings.batch_size]
            new_ids = _generate_batch(
                model,
                [prompt_ids[row] for row in rows],
                settings=settings,
                seeds=[example_seed(seed, places[row]) for row in rows],
                eos_id=eos_id,
                num_tokens=num_tokens,
            )
            for row, ids in zip(rows, new_ids, strict=True):
                answers[row] = _answer(tokenizer, ids, eos_id)
                if on_answer is not None:
                    on_answer(row, answers[row])
            if progress is not None:
                progress(len(rows))
    return [answers[row] for row in range(len(prompts))]


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


def _answer(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], eos_id: int) -> Answer:
    kept, truncated = cut_at_eos(ids, eos_id)
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Answer(text=str(text), num_tokens=len(kept), truncated=truncated, ids=tuple(kept))


def _eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "the tokenizer has no end-of-text token",
            why="training ends every answer with it, and generation stops there",
            fix='set "eos_token" in the model folder\'s tokenizer_config.json',
        )
    return int(tokenizer.eos_token_id)


def _left_pad(
    prompt_ids: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns ``input_ids_BT`` and ``attention_mask_BT`` (int64), padded on the left."""
    length = max(len(ids) for ids in prompt_ids)
    padded = [[pad_id] * (length - len(ids)) + list(ids) for ids in prompt_ids]
    mask = [[0] * (length - len(ids)) + [1] * len(ids) for ids in prompt_ids]
    return torch.tensor(padded, device=device), torch.tensor(mask, device=device)


def _generate_batch(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    *,
    settings: SamplingConfig,
    seeds: Sequence[int],
    eos_id: int,
    num_tokens: int,
) -> list[list[int]]:
    """Returns the new tokens of each row; after the end-of-text token stands padding."""
    # Padding is the end-of-text token even where the tokenizer has a padding token: masked out, it
    # changes nothing, and an added padding token may have no row in the model's embedding.
    input_ids_BT, attention_mask_BT = _left_pad(prompt_ids, eos_id, model.device)
    processors, watch = build_processors(
        settings,
        prompt_ids=prompt_ids,
        seeds=seeds,
        num_tokens=num_tokens,
        device=model.device,
    )
    generate = getattr(model, "generate", None)
    if not callable(generate):
        raise ConfigError(f"{type(model).__name__} cannot generate text: no causal language model")
    output_BT = generate(
        input_ids=input_ids_BT,
        attention_mask=attention_mask_BT,
        logits_processor=processors,
        generation_config=GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,  # the argmax of ExampleSampler's scores is the sample
            num_beams=1,
            use_cache=True,
            eos_token_id=eos_id,
            pad_token_id=eos_id,
        ),
    )
    if watch.has_seen():
        raise NumericsError(
            "the model's logits are not finite while it generates",
            why="weights that diverged, or an overflow in the model's dtype",
            fix="--dtype float32 (generate: --model.teacher_dtype float32) tells the two apart",
        )
    new_ids: list[list[int]] = output_BT[:, input_ids_BT.shape[1] :].tolist()
    return new_ids


@contextmanager
def _evaluation_state(model: PreTrainedModel) -> Iterator[None]:
    """Puts the model in eval mode, with an empty generation config; restores both.

    ``generate`` fills whatever its caller leaves open from the model's own generation config: a
    checkpoint's ``repetition_penalty`` (Qwen2.5: 1.1) would silently enter the protocol.
    """
    was_training, own_config = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own_config
        model.train(was_training)
