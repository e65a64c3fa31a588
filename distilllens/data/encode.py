"""From texts to token ids, and what identifies a tokenizer."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from distilllens.data.records import file_sha256


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of each prompt: the tokenizer's own BOS, if it sets one, but never an EOS.

    Training and evaluation both use this, so that a response starts at the same boundary.
    """
    if not prompts:
        return []
    encoded: list[list[int]] = tokenizer(list(prompts))["input_ids"]
    # Some tokenizers are saved with add_eos_token: EOS before the answer would end it.
    if tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id:
        encoded = [ids[:-1] for ids in encoded]
    return encoded


def encode_responses(
    tokenizer: PreTrainedTokenizerBase, responses: Sequence[str]
) -> list[list[int]]:
    """Returns the ids of each answer without special tokens, and EOS at its end."""
    if not responses:
        return []
    encoded: list[list[int]] = tokenizer(list(responses), add_special_tokens=False)["input_ids"]
    return [[*ids, tokenizer.eos_token_id] for ids in encoded]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the SHA-256 of all that decides a tokenizer's ids: vocabulary, merges, rules.

    Equal for a saved and reloaded tokenizer. Padding and truncation settings, which every call
    may change, and the folder it came from are left out.
    """
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["padding"] = state["truncation"] = None
    else:
        with tempfile.TemporaryDirectory() as folder:
            files = tokenizer.save_vocabulary(folder)
            state = {Path(name).name: file_sha256(name) for name in files}
        state["vocabulary"] = tokenizer.get_vocab()
        # Shows what is added to a text (BOS), wherever a tokenizer class keeps that setting.
        state["probe"] = tokenizer("a b\n")["input_ids"]
    identity = {
        "state": state,
        "special_tokens": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
    }
    canonical = json.dumps(identity, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
