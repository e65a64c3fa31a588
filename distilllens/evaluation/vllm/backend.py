"""Answers by vLLM instead of transformers: an extra, for GPUs.

The same function, the same settings, the same results file; the samples differ, so results of the
two are told apart (see `provenance`). Each request has its own seed, but vLLM's rounding depends on
the batch: unlike ours, its answers are not promised to be the same in any company.

vLLM has no n-gram rule. `rules` adds it where vLLM takes logits processors of its V1 model
runner; every answer is then checked, so a version that ignores the rule is an error, never another
protocol.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from distilllens.config import EvaluateConfig, SamplingConfig
from distilllens.errors import ConfigError
from distilllens.evaluation.decoding.sampling import NoRepeatNgrams, example_seed
from distilllens.evaluation.generation import (
    Answer,
    decode_answer,
    encode_within,
    get_eos_id,
)
from distilllens.models import context_length, load_model_config

CHUNK_PROMPTS = 512
"""Prompts handed over at once; answers come, and a stop is heard, after each such chunk."""
PROCESSOR = "distilllens.evaluation.vllm.rules:RowRulesProcessor"


class VllmModel:
    """A checkpoint in vLLM.

    Args:
        config: Checkpoint, precision, longest prompt and answer, rows at once.

    Raises:
        ConfigError: vLLM is not installed, or an option that it does not have.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        check_vllm(config)
        # Newer versions have a runner of their own, which knows no processors of this kind.
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
        self.vllm: Any = importlib.import_module("vllm")
        self.llm: Any = self.vllm.LLM(
            model=config.checkpoint,
            tokenizer=config.checkpoint,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            dtype=config.dtype,
            max_model_len=_longest(config),
            max_num_seqs=config.eval.batch_size,
            generation_config="vllm",  # not the checkpoint's own
            logits_processors=[PROCESSOR],
        )
        self.device = torch.device("cuda")
        self.dtype = f"{config.dtype} (vllm)"


def _longest(config: EvaluateConfig) -> int:
    """Returns tokens of prompt and answer, no more than the model has positions for."""
    longest = config.max_prompt_length + config.eval.max_new_tokens
    window = context_length(
        load_model_config(
            config.checkpoint,
            trust_remote_code=config.trust_remote_code,
            revision=config.revision,
        )
    )
    return longest if window is None else min(longest, window)


def check_vllm(config: EvaluateConfig) -> None:
    """Refuses what vLLM cannot do, before anything is loaded.

    Raises:
        ConfigError: vLLM is not installed, or an option that it does not have.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "backend=vllm needs vllm, which is not installed",
            fix="bash scripts/setup.sh vllm (Linux with a GPU), or --backend transformers",
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "--backend vllm runs in one process: each engine would take the first GPU",
            fix="start it without torchrun (GPUS=1 in front of a script); other runs may have the "
            "other GPUs by CUDA_VISIBLE_DEVICES",
        )
    if config.attention != "auto":
        raise ConfigError(
            f"attention={config.attention} is transformers'; vllm chooses its own",
            fix="--attention auto, or --backend transformers",
        )


def generate_answers(
    model: VllmModel,
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
    """Generates one answer to each prompt; see `generation.generate_answers` for the arguments.

    Raises:
        ConfigError: A prompt is over the limit, the tokenizer has no end-of-text token, or this
            version of vLLM does not apply the rules.
    """
    eos_id = get_eos_id(tokenizer)
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    prompt_ids = encode_within(tokenizer, prompts, max_prompt_length)
    places = range(len(prompts)) if indices is None else indices
    answers: list[Answer] = []
    for start in range(0, len(prompts), CHUNK_PROMPTS):
        chunk = range(start, min(start + CHUNK_PROMPTS, len(prompts)))
        outputs = model.llm.generate(
            [{"prompt_token_ids": prompt_ids[place]} for place in chunk],
            [
                model.vllm.SamplingParams(
                    **request_settings(settings, eos_id=eos_id, num_tokens=num_tokens),
                    seed=example_seed(seed, places[place]) >> 1,  # 63 bits
                )
                for place in chunk
            ],
            use_tqdm=False,
        )
        for place, output in zip(chunk, outputs, strict=True):
            new_ids = list(output.outputs[0].token_ids)
            check_rules(prompt_ids[place], new_ids, settings.no_repeat_ngram_size, num_tokens)
            answers.append(decode_answer(tokenizer, new_ids, eos_id))
            if on_answer is not None:
                on_answer(place, answers[place])
        if progress is not None:
            progress(len(chunk))
    return answers


def request_settings(settings: SamplingConfig, *, eos_id: int, num_tokens: int) -> dict[str, Any]:
    """Returns the arguments of vLLM's ``SamplingParams`` that all requests share."""
    return {
        "temperature": settings.temperature if settings.do_sample else 0.0,
        "top_p": settings.top_p,
        "top_k": settings.top_k or -1,
        "max_tokens": settings.max_new_tokens,
        "stop_token_ids": [eos_id],
        "detokenize": False,
        "extra_args": {
            "num_tokens": num_tokens,
            "no_repeat_ngram_size": settings.no_repeat_ngram_size,
        },
    }


def check_rules(
    prompt_ids: Sequence[int], new_ids: Sequence[int], ngram_size: int, num_tokens: int
) -> None:
    """Checks that an answer keeps the rules.

    Raises:
        ConfigError: It does not: this version of vLLM ignored them.
    """
    if any(token >= num_tokens for token in new_ids):
        broken = f"chose a row of the head that stands for no token (of {num_tokens})"
    elif ngram_size > 0 and repeats(prompt_ids, new_ids, ngram_size):
        broken = f"repeated {ngram_size} tokens, against eval.no_repeat_ngram_size={ngram_size}"
    else:
        return
    raise ConfigError(
        f"vllm {broken}",
        why="this version does not apply logits processors of the V1 model runner",
        fix="--eval.no_repeat_ngram_size 0 (another protocol), another version of vllm, or "
        "--backend transformers",
    )


def repeats(prompt_ids: Sequence[int], new_ids: Sequence[int], size: int) -> bool:
    """Tells whether new tokens repeat an n-gram of the text before them."""
    ngrams = NoRepeatNgrams(size, prompt_ids)
    for token in new_ids:
        if token in ngrams.banned():
            return True
        ngrams.append(token)
    return False
