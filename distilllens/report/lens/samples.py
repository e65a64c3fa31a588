"""The text that a lens report looks at: held-out records, single prompts, greedy answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from distilllens.data.collate import Batch, collate
from distilllens.data.encode import encode_prompts, encode_responses
from distilllens.data.prompts import alpaca_prompt
from distilllens.data.records import read_records
from distilllens.errors import ConfigError, DataError
from distilllens.families import run_body
from distilllens.lens import LogitLens
from distilllens.report.scores.samples import shown_prompt

BATCH_SIZE = 8
"""Records per forward pass."""


@dataclass(frozen=True, kw_only=True)
class TextSample:
    """A prompt and an answer as token ids."""

    title: str
    """Where it comes from: record 3, own prompt 1."""
    prompt: str
    """What a reader should see of the prompt: without the template's fixed lines."""
    answered_by: str
    """reference, teacher, student, or given."""
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    """Empty while a model has still to answer."""
    cut: bool = False
    """Whether the answer goes on behind these ids."""

    def batch(self, pad_id: int) -> Batch:
        """Returns the sample as a batch of one."""
        return collate([self.ids()], pad_id=pad_id)

    def ids(self) -> dict[str, list[int]]:
        """Returns the ids as `collate` takes them."""
        return {"prompt_ids": list(self.prompt_ids), "response_ids": list(self.response_ids)}


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The records of the figures."""

    samples: tuple[TextSample, ...]
    num_records: int
    """Records looked at: the first so many of the file."""
    num_left_out: int
    """Of them, those without an answer or with a prompt over the limit."""

    def batches(self, pad_id: int) -> list[Batch]:
        """Returns the samples in batches, in their order."""
        ids = [sample.ids() for sample in self.samples]
        starts = range(0, len(ids), BATCH_SIZE)
        return [collate(ids[start : start + BATCH_SIZE], pad_id=pad_id) for start in starts]


def read_held_out(
    data: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    max_length: int,
    max_prompt_length: int,
) -> HeldOut:
    """Reads the first records of a file as prompt + first reference, as training reads them.

    Args:
        data: JSON Lines; ``output`` is a string or a list of references.
        tokenizer: Of all models.
        count: Look at so many records.
        max_length: Longest prompt + answer in tokens; longer answers are cut.
        max_prompt_length: Records with longer prompts (tokens) are left out.

    Raises:
        DataError: No such file, a broken line, no usable record among those looked at.
    """
    records = read_records(data, references="many").records[:count]
    prompts = encode_prompts(tokenizer, [record.prompt for record in records])
    responses = encode_responses(tokenizer, [record.outputs[0] for record in records])
    samples = []
    for number, (record, prompt_ids, response_ids) in enumerate(
        zip(records, prompts, responses, strict=True), start=1
    ):
        if not record.outputs[0].strip() or len(prompt_ids) > max_prompt_length:
            continue
        room = max_length - len(prompt_ids)
        if record.truncated:
            response_ids = response_ids[:-1]  # it goes on: no end-of-text there
        sample = TextSample(
            title=f"Record {number}",
            prompt=shown_prompt(record.prompt),
            answered_by="reference",
            prompt_ids=tuple(prompt_ids),
            response_ids=tuple(response_ids[:room]),
            cut=len(response_ids) > room or record.truncated,
        )
        if sample.response_ids:
            samples.append(sample)
    if not samples:
        raise DataError(
            f"{data}: none of the first {len(records)} records has an answer and a prompt of at "
            f"most {max_prompt_length} tokens",
            fix="give another file with --data, more records with --prompts, or a larger "
            "--max_prompt_length",
        )
    return HeldOut(
        samples=tuple(samples),
        num_records=len(records),
        num_left_out=len(records) - len(samples),
    )


def own_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    max_prompt_length: int,
) -> list[TextSample]:
    """Returns prompts from the command line, as instructions in the template of training.

    Args:
        tokenizer: Of all models.
        prompts: Instructions.
        responses: Their answers, or none at all: then a model answers (`answer_greedily`).
        max_prompt_length: In tokens.

    Raises:
        ConfigError: Some but not all have an answer, or one is empty or too long.
    """
    if responses and len(responses) != len(prompts):
        raise ConfigError(
            f"{len(prompts)} × --prompt, but {len(responses)} × --response",
            fix="give one --response for each --prompt, or none",
        )
    samples = []
    for number, prompt in enumerate(prompts, start=1):
        text = alpaca_prompt(prompt)
        try:
            [prompt_ids] = encode_prompts(tokenizer, [text])
            given = encode_responses(tokenizer, [responses[number - 1]])[0] if responses else []
        except (TypeError, UnicodeEncodeError) as error:  # half a surrogate pair from the shell
            raise ConfigError(f"--prompt {number} is no text", why=str(error)) from None
        if not prompt.strip() or len(prompt_ids) > max_prompt_length:
            raise ConfigError(
                f"--prompt {number} has {len(prompt_ids)} tokens with its template",
                why=f"a prompt must not be empty, nor longer than {max_prompt_length} tokens",
                fix="another --prompt, or a larger --max_prompt_length",
            )
        samples.append(
            TextSample(
                title=f"Own prompt {number}",
                prompt=shown_prompt(text),
                answered_by="given" if responses else "",
                prompt_ids=tuple(prompt_ids),
                response_ids=tuple(given),
            )
        )
    return samples


@torch.no_grad()
def answer_greedily(
    lens: LogitLens, prompt_ids: Sequence[int], *, limit: int, eos: int
) -> list[int]:
    """Returns a model's greedy answer: always the token with the largest logit, no other rule.

    Args:
        lens: Of the model.
        prompt_ids: The prompt.
        limit: Stop after so many tokens.
        eos: Stop behind this token, which is part of the answer.
    """
    device = next(lens.model.parameters()).device
    ids = list(prompt_ids)
    while len(ids) < len(prompt_ids) + limit:
        final_BTD, _ = run_body(lens.parts, torch.tensor([ids], device=device))
        ids.append(int(lens.head_logits(final_BTD[:, -1]).argmax()))
        if ids[-1] == eos:
            break
    return ids[len(prompt_ids) :]
