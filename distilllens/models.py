"""Loading: tokenizer, frozen teacher, student with or without LoRA; and whether they fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from distilllens.config import LoraConfig, ModelConfig
from distilllens.errors import ConfigError
from distilllens.libraries import quiet_libraries

HUB_TIMEOUT_S = 5.0


def load_model_config(
    path: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> PretrainedConfig:
    """Loads a model's configuration without its weights.

    Raises:
        ConfigError: The folder is not there, is no model folder, or is a hub name while offline.
    """
    offline = _check_source(path, "config.json", revision)
    try:
        return AutoConfig.from_pretrained(
            path,
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_files_only=offline,
        )
    except (OSError, ValueError) as error:
        raise _unloadable(path, error) from None


def load_tokenizer(
    path: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer beside a model.

    Raises:
        ConfigError: Not there, or it knows no tokens or no end-of-sequence token.
    """
    offline = _check_source(path, "tokenizer_config.json", revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_files_only=offline,
        )
    except (OSError, ValueError) as error:
        raise _unloadable(path, error) from None
    if len(tokenizer) < 2 or tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer of {path} has {len(tokenizer)} tokens and "
            f"eos_token={tokenizer.eos_token!r}",
            why="answers end with the end-of-sequence token",
            fix=f"put tokenizer.json and an eos_token into {path}",
        )
    return tokenizer


def load_model(
    path: str,
    *,
    dtype: torch.dtype | None = None,
    attention: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """Loads a causal language model in evaluation mode; weights from safetensors only.

    Args:
        path: Local folder, or name of a hub repository.
        dtype: Of the weights; None: as stored.
        attention: Attention implementation, or ``auto``.
        trust_remote_code: Run Python code that comes with the model.
        revision: Commit hash of a hub repository.

    Raises:
        ConfigError: Not there, pickled weights, unknown family, a shape that does not fit.
    """
    quiet_libraries()
    config = load_model_config(path, trust_remote_code=trust_remote_code, revision=revision)
    offline = _check_source(path, "config.json", revision)
    options: dict[str, Any] = {} if attention == "auto" else {"attn_implementation": attention}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=offline,
            revision=revision,
            trust_remote_code=trust_remote_code,
            **options,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise _unloadable(path, error) from None
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        raise ConfigError(
            f"cannot load {path}",
            why=f"its weights lack {len(missing)} tensors that config.json asks for, first "
            f"{missing[0]}; they would stay at random values",
        )
    return model.eval()


def load_teacher(config: ModelConfig, *, dtype: torch.dtype) -> PreTrainedModel:
    """Loads the teacher, merges its adapter if it has one, and freezes it.

    Raises:
        ConfigError: As `load_model`; an adapter that is not there or does not fit.
    """
    assert config.teacher is not None
    model = load_model(
        config.teacher,
        dtype=dtype,
        attention=config.attention,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
    )
    if config.teacher_lora is not None:
        _check_folder(config.teacher_lora, "adapter_config.json")
        try:
            adapted = PeftModel.from_pretrained(model, config.teacher_lora)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ConfigError(
                f"the adapter {config.teacher_lora} does not fit {config.teacher}",
                why=_first_line(error),
            ) from None
        model = adapted.merge_and_unload()
    return model.eval().requires_grad_(False)


def load_student(config: ModelConfig, *, dtype: torch.dtype) -> nn.Module:
    """Loads the student for training, with an adapter and gradient checkpointing if asked for.

    Raises:
        ConfigError: As `load_model`.
    """
    model = load_model(
        config.student,
        dtype=dtype,
        attention=config.attention,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
    )
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if config.student_lora is None:
        return model.train()
    return _add_lora(model, config.student_lora).train()


def _add_lora(model: PreTrainedModel, lora: LoraConfig) -> nn.Module:
    settings = PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, settings)


def num_blocks(config: PretrainedConfig) -> int:
    """Returns the number of transformer blocks."""
    return int(config.get_text_config().num_hidden_layers)


def vocab_rows(config: PretrainedConfig) -> int:
    """Returns the number of rows of the LM head, padding included."""
    return int(config.get_text_config().vocab_size)


def context_length(config: PretrainedConfig) -> int | None:
    """Returns the longest sequence the model's positions allow, or None if it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_same_tokens(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Compares two tokenizers id by id.

    Raises:
        ConfigError: Some ids stand for different tokens; counts them and shows the first.
    """
    size = max(len(teacher), len(student))
    teacher_tokens = _tokens_by_id(teacher, size)
    student_tokens = _tokens_by_id(student, size)
    pairs = zip(teacher_tokens, student_tokens, strict=True)
    different = [i for i, (t, s) in enumerate(pairs) if t != s]
    if different:
        first = different[0]
        raise ConfigError(
            f"teacher and student tokenizers differ: {len(different)} of {size} ids differ, "
            f"first {first}: {teacher_tokens[first]!r} against {student_tokens[first]!r}",
            why="both distributions must be over the same tokens",
            fix="choose a teacher and a student of one family",
        )


def _tokens_by_id(tokenizer: PreTrainedTokenizerBase, size: int) -> list[str | None]:
    by_id: list[str | None] = [None] * size
    for token, index in tokenizer.get_vocab().items():
        if index < size:
            by_id[index] = token
    return by_id


def shared_vocab_size(teacher_rows: int, student_rows: int, num_tokens: int) -> tuple[int, str]:
    """Returns how many tokens both heads share, and a message if one is padded beyond them.

    Args:
        teacher_rows: Rows of the teacher's head.
        student_rows: Rows of the student's head.
        num_tokens: Tokens that the tokenizer knows.

    Raises:
        ConfigError: A head has fewer rows than the tokenizer has tokens.
    """
    shared = min(teacher_rows, student_rows)
    if shared < num_tokens:
        raise ConfigError(
            f"the tokenizer has {num_tokens} tokens, but the teacher's head has {teacher_rows} "
            f"rows and the student's {student_rows}",
            why="only padding can be cut from a vocabulary, not tokens",
            fix="resize the smaller model's embeddings, or choose models of one family",
        )
    if teacher_rows == student_rows:
        return shared, ""
    who, rows = ("teacher", teacher_rows) if teacher_rows > shared else ("student", student_rows)
    return shared, f"{who} vocabulary {rows} cut to {shared} (padding, no tokens)"


def _check_source(path: str, must_hold: str, revision: str | None = None) -> bool:
    """Returns whether to stay off the network: for folders, and while the hub cannot be reached.

    One quick request decides; the libraries themselves would retry for a minute.

    Raises:
        ConfigError: `_check_folder`; or the hub says that there is no such repository.
    """
    _check_folder(path, must_hold)
    if Path(path).expanduser().is_dir():
        return True
    try:
        HfApi().model_info(path, revision=revision, timeout=HUB_TIMEOUT_S)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise _unloadable(path, error) from None
    except Exception:  # no connection, by whatever transport: what is in the cache still loads
        return True
    return False


def _check_folder(path: str, must_hold: str) -> None:
    """Refuses at once what is meant as a local folder and is not one."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / must_hold).is_file():
            raise ConfigError(
                f"{path} holds no {must_hold}",
                why="a model folder has config.json, tokenizer files and model.safetensors",
            )
        return
    if folder.exists():
        raise ConfigError(f"{path} is a file, not a model folder")
    looks_local = path.startswith((".", "/", "~")) or folder.parent.is_dir()
    if looks_local or path.count("/") > 1:
        raise ConfigError(
            f"model folder {path} not found",
            fix="put a Hugging Face model folder there (checkpoints/README.md says how), "
            "or change model.student / model.teacher",
        )


def _unloadable(path: str, error: Exception) -> ConfigError:
    if Path(path).is_dir():
        return ConfigError(f"cannot load {path}", why=_first_line(error))
    return ConfigError(
        f"{path} not found locally, nor on the hub",
        why=_first_line(error),
        fix="download it into checkpoints/ on a machine with network access",
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
