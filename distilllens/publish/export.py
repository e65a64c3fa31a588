"""Models as Hugging Face folders, of a training and out of a checkpoint."""

from __future__ import annotations

import copy
import errno
import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from distilllens.config import SamplingConfig, load_config
from distilllens.data.encode import encode_prompts
from distilllens.data.prompts import alpaca_prompt, chat_template
from distilllens.errors import (
    CheckpointError,
    ConfigError,
    StorageError,
)
from distilllens.families import base_model
from distilllens.models import vocab_rows
from distilllens.publish.card import maybe_write_card, write_card
from distilllens.publish.card_facts import CardFacts, dev_metrics_at, facts_of_run, read_facts
from distilllens.publish.card_scores import mirrored_evaluations, scores_of_model
from distilllens.runs import RunFolder
from distilllens.runtime import distributed
from distilllens.runtime.faults import reach
from distilllens.runtime.manifest import (
    draft_folder,
    find_damage,
    newest_good_state,
    read_manifest,
    replace_folder,
)

logger = logging.getLogger("distilllens")

STUDENT_FOLDER = "student"
"""Of a saved state: the student as a Hugging Face folder."""
PROTOCOL = SamplingConfig()
"""The evaluation's settings, where a caller has no own."""


def export_model(
    engine: Any,
    student: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    sampling: SamplingConfig = PROTOCOL,
    card: CardFacts | None = None,
) -> None:
    """Writes the student as a Hugging Face folder: safetensors, tokenizer, generation config, card.

    All processes must call it; the first writes. Adapters are merged. The folder is written beside
    its place and then renamed, so a reader finds the old or the new one whole.

    Args:
        engine: DeepSpeed engine that trains the student.
        student: The module inside it, with or without LoRA.
        tokenizer: Goes along.
        folder: Replaced if it exists.
        sampling: How the student is evaluated; its lengths become the folder's defaults.
        card: What the card tells, on the first process; None: no card.

    Raises:
        StorageError: No space, or no right to write.
    """
    weights = gather_weights(engine)

    def write(draft: Path) -> None:
        write_model(student, tokenizer, draft, weights, sampling=sampling, card=card)

    distributed.on_main(lambda: _replace(folder, write))


def gather_weights(engine: Any) -> dict[str, Any] | None:
    """Collects the student's weights on the first process; all must call it.

    Returns:
        With ZeRO-3 the whole weights by name, on the first process. Without it None: every
        process has them in its module.
    """
    if not engine.zero_optimization_partition_weights():
        return None
    gathered = engine._zero3_consolidated_16bit_state_dict() or {}
    own = "student."  # what is trained along with the student, as projectors, stays behind
    return {name.removeprefix(own): w for name, w in gathered.items() if name.startswith(own)}


def write_model(
    student: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, Any] | None,
    *,
    sampling: SamplingConfig = PROTOCOL,
    card: CardFacts | None = None,
) -> None:
    """Writes a Hugging Face folder, adapters merged, in the precision of the student's weights.

    Its chat template and generation config are those of the training, not what the checkpoint that
    it began with brought along.

    Args:
        student: With or without LoRA; not changed.
        tokenizer: Goes along; not changed.
        folder: Made if it is not there.
        weights: Of ``student``, where its own are in parts; else None.
        sampling: How the student is evaluated.
        card: What the card tells; None: no card.
    """
    if isinstance(student, PeftModel):
        whole = copy.deepcopy(student) if weights is None else _with_weights(student, weights)
        student, weights = whole.merge_and_unload(), None
    model = base_model(student)
    model.save_pretrained(folder, state_dict=weights)
    rows = vocab_rows(model.config)
    generation_settings(tokenizer, rows, sampling).save_pretrained(folder)
    chatting = with_chat_template(tokenizer)
    chatting.save_pretrained(folder)
    if card is not None:
        facts = replace(card, chat="template" if chatting.chat_template else "text only")
        maybe_write_card(folder, lambda: write_card(folder, facts))


def generation_settings(
    tokenizer: PreTrainedTokenizerBase, rows: int, sampling: SamplingConfig
) -> GenerationConfig:
    """Returns what ``generate`` and pipelines do by default with an exported student.

    Greedy, with the length and the n-gram rule of the evaluation, so that a pipeline gives the text
    that the evaluation would score. A base checkpoint's own, as Qwen2.5's repetition penalty of
    1.1, would give another.

    Args:
        tokenizer: Of the student.
        rows: Of its LM head; those that stand for no token are forbidden.
        sampling: How the student is evaluated.
    """
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        no_repeat_ngram_size=sampling.no_repeat_ngram_size or None,
        suppress_tokens=list(range(num_tokens, rows)) or None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,  # masked out; an added one may have no embedding
    )


PROBE = "Sort the words: pear, apple."


def with_chat_template(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Returns a copy of a tokenizer whose chat template makes the prompt of training.

    A base's own template is replaced: the student was not trained on it. Chats are tokenised
    without the special tokens that a text gets, so the template has them; where that gives other
    tokens than training had (some tokenizers treat a text behind a special token differently), or
    none at all, the copy has none.
    """
    chatting = copy.copy(tokenizer)
    chatting.chat_template = None
    try:
        gives_the_prompt = _set_template(chatting)
    except Exception as error:  # of a tokenizer's own code: a template must never cost a model
        gives_the_prompt = False
        reason = str(error).partition("\n")[0] or type(error).__name__
        logger.warning("the exported tokenizer gets no chat template: %s", reason)
    if not gives_the_prompt:
        chatting.chat_template = None
    return chatting


def _set_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Gives a tokenizer the template; returns whether chats have the tokens of training."""
    prompt = alpaca_prompt(PROBE)
    expected = encode_prompts(tokenizer, [prompt])[0]
    bare: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    before = tokenizer.convert_ids_to_tokens(expected[: len(expected) - len(bare)])
    tokenizer.chat_template = chat_template("".join(before))
    chat = [{"role": "user", "content": PROBE}]
    encoded = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    return bool(encoded == expected)


def _with_weights(student: PeftModel, weights: dict[str, Any]) -> PeftModel:
    """Builds an adapted model like ``student`` around other weights, without making any."""
    base = base_model(student)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(base.config, dtype=base.dtype)
        assert isinstance(plain, PreTrainedModel)
        adapted = get_peft_model(plain, copy.deepcopy(student.peft_config["default"]))
    adapted.load_state_dict(weights, assign=True)
    plain.generation_config = copy.deepcopy(base.generation_config)
    assert isinstance(adapted, PeftModel)
    return adapted


def copy_model(source: Path, folder: Path) -> None:
    """Copies an exported model, on the first process; the copy appears at once.

    Raises:
        StorageError: No space, or no right to write.
    """
    distributed.on_main(lambda: _replace(folder, lambda draft: shutil.copytree(source, draft)))


def _replace(folder: Path, write: Callable[[Path], object]) -> None:
    """Writes a folder beside its place, then puts it there."""
    draft = draft_folder(folder)
    try:
        write(draft)
        replace_folder(draft, folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise storage_error(error, folder) from None


def storage_error(
    error: Exception, path: Path, *, kept: str = "models saved before are untouched"
) -> StorageError:
    """Explains a failed write, with the free space (torch and safetensors hide the errno)."""
    existing = next(p for p in [path, *path.parents] if p.exists())
    free = shutil.disk_usage(existing).free
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    is_full = free == 0 or "No space left" in text or getattr(error, "errno", 0) == errno.ENOSPC
    return StorageError(
        f"{'no space left: ' if is_full else ''}could not write {path} ({free / 1e9:.2f} GB free)",
        why=text,
        fix="free some space, or choose another --run.output_dir",
        kept=kept,
    )


# --- Out of a checkpoint --------------------------------------------------------------------------


def choose_state(path: Path) -> Path:
    """Returns the state that an argument of the command means, verified.

    Args:
        path: A folder ``step-N``, or a run's folder: its newest good state.

    Raises:
        CheckpointError: It is neither, or every state is damaged; the message names each.
    """
    states = RunFolder(path).state
    if not states.is_dir():
        if damage := find_damage(path):
            raise CheckpointError(
                f"{path} is no good checkpoint",
                why=damage,
                fix="give a folder step-N of a run's state/, or the run's folder",
            )
        return path
    good, damaged = newest_good_state(states)
    for damage in damaged.values():
        print(f"passed over: {damage}", file=sys.stderr)
    if good is None:
        raise CheckpointError(
            f"{states} holds no good checkpoint", why="; ".join(damaged.values()) or "it is empty"
        )
    return good


def export_state(state: Path, folder: Path) -> None:
    """Copies the student out of a verified state.

    Raises:
        ConfigError: ``folder`` is there already.
        StorageError: No space, or no right to write.
    """
    if folder.exists():
        raise ConfigError(f"{folder} is there already", fix="choose another --to, or delete it")
    draft = draft_folder(folder)
    try:
        reach("export.verified")
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(state / STUDENT_FOLDER, draft)
        maybe_write_card(draft, lambda: _write_card_of_state(state, draft))
        reach("export.copied")
        replace_folder(draft, folder)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise storage_error(error, folder, kept=f"{state} is untouched") from None


def _write_card_of_state(state: Path, folder: Path) -> None:
    """Writes the card of a model out of a state, with what its run has measured since."""
    run, facts = RunFolder(state.resolve().parents[1]), read_facts(folder)
    if facts is None:  # a state of an earlier version
        facts = facts_of_run(run, load_config(["--config", str(run.config)]))
    step = int(read_manifest(state)["step"])
    facts = replace(facts, step=step, dev=dev_metrics_at(run, step))
    write_card(folder, facts, scores_of_model(folder, mirrored_evaluations(run.root)))
