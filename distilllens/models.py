"""Loading: tokenizer, frozen teacher, student with or without LoRA; and whether they fit."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from distilllens.config import LoraConfig, ModelConfig
from distilllens.errors import ConfigError
from distilllens.model_files import (
    LARGEST_SIZES,
    check_adapter,
    check_amount,
    check_settings,
    check_source,
    check_weights,
    first_line,
    unloadable,
)
from distilllens.runtime.libraries import quiet_libraries


def load_model_config(
    path: str, *, trust_remote_code: bool = False, revision: str | None = None, option: str = ""
) -> PretrainedConfig:
    """Loads a model's configuration without its weights.

    Args:
        path: Local folder, or name of a hub repository.
        trust_remote_code: Run Python code that comes with the model.
        revision: Commit hash of a hub repository.
        option: By which the user gave the path, as ``--model.student``; for the advice.

    Raises:
        ConfigError: The folder is not there, is no model folder, or is a hub name while offline;
            its config.json is broken, asks for code of its own without ``trust_remote_code``, has
            sizes that no model has, or is of a family that predicts no next token.
    """
    offline = check_source(path, "config.json", revision, option=option)
    check_settings(path, "config.json", trust_remote_code=trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(
            path,
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_files_only=offline,
        )
        if not trust_remote_code and hasattr(config, "auto_map"):
            del config.auto_map  # no code of the folder's, nor in what is exported
        text_config = config.get_text_config()
        sizes = {name: getattr(text_config, name, None) for name in LARGEST_SIZES}
    except Exception as error:  # whatever a library stumbles over in a stranger's file
        raise unloadable(path, error, "config.json") from None
    for name, size in sizes.items():
        if type(size) is not int or not 1 <= size <= LARGEST_SIZES[name]:
            raise ConfigError(
                f"cannot load {path}",
                why=f"{name}={size!r:.40} must be a whole number in [1, {LARGEST_SIZES[name]:,}]",
            )
    if not trust_remote_code and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(
            f"cannot load {path}", why=f"{config.model_type} is no causal language model"
        )
    return config


def load_tokenizer(
    path: str, *, trust_remote_code: bool = False, revision: str | None = None, option: str = ""
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer beside a model; arguments as `load_model_config`.

    Raises:
        ConfigError: Not there or broken; it asks for code of its own without
            ``trust_remote_code``, knows no tokens or no end-of-sequence token, or has ids that the
            model beside it has no rows for.
    """
    offline = check_source(path, "tokenizer_config.json", revision, option=option)
    check_settings(path, "tokenizer_config.json", trust_remote_code=trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_files_only=offline,
        )
    except Exception as error:  # whatever a library stumbles over in a stranger's file
        raise unloadable(path, error, "its tokenizer") from None
    if not trust_remote_code:
        tokenizer.init_kwargs.pop("auto_map", None)
    if len(tokenizer) < 2 or tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer of {path} has {len(tokenizer)} tokens and "
            f"eos_token={tokenizer.eos_token!r}",
            why="answers end with the end-of-sequence token",
            fix=f"put tokenizer.json and an eos_token into {path}",
        )
    try:
        tokenizer("Does it work?")
    except Exception as error:
        raise unloadable(path, error, "its tokenizer") from None
    if (Path(path) / "config.json").is_file():
        config = load_model_config(path, trust_remote_code=trust_remote_code, revision=revision)
        _check_ids(path, tokenizer, vocab_rows(config))
    return tokenizer


def _check_ids(path: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Refuses a token whose id would read beyond the embeddings in the middle of a run."""
    token, index = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if index >= rows:
        raise ConfigError(
            f"the tokenizer of {path} has the token {token!r:.40} with id {index}, "
            f"the model has {rows} rows (vocab_size)",
            fix="resize the model's embeddings, or remove the token from its tokenizer",
        )


def load_model(
    path: str,
    *,
    dtype: torch.dtype | None = None,
    attention: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    quantization: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """Loads a causal language model in evaluation mode; weights from safetensors only.

    Args:
        path: Local folder, or name of a hub repository.
        dtype: Of the weights; None: as stored.
        attention: Attention implementation, or ``auto``.
        trust_remote_code: Run Python code that comes with the model.
        revision: Commit hash of a hub repository.
        quantization: Fewer bits for its linear layers, all but the head; None: as ``dtype`` says.

    Raises:
        ConfigError: Not there, pickled weights, unknown family, a shape that does not fit.
    """
    quiet_libraries()
    config = load_model_config(path, trust_remote_code=trust_remote_code, revision=revision)
    check_weights(path)
    check_amount(path, config, trust_remote_code=trust_remote_code)
    offline = check_source(path, "config.json", revision)
    options: dict[str, Any] = {} if attention == "auto" else {"attn_implementation": attention}
    if quantization is not None:
        options["quantization_config"] = quantization
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
    except Exception as error:  # whatever a library stumbles over in a stranger's file
        raise unloadable(path, error) from None
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        raise ConfigError(
            f"cannot load {path}",
            why=f"its weights lack {len(missing)} tensors that config.json asks for, first "
            f"{missing[0]}; they would stay at random values",
        )
    return model.eval()


def load_teacher(config: ModelConfig, *, dtype: torch.dtype | None) -> PreTrainedModel | PeftModel:
    """Loads the teacher, merges its adapter if it has one, and freezes it; dtype as `load_model`.

    The adapter of a quantised teacher stays beside its layers: merged, it would be rounded with
    them.

    Raises:
        ConfigError: As `load_model`; an adapter that is not there or does not fit; bitsandbytes is
            not installed.
    """
    assert config.teacher is not None
    model = load_model(
        config.teacher,
        dtype=dtype,
        attention=config.attention,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
        quantization=quantization_settings(config.teacher_quantization, dtype),
    )
    if config.teacher_lora is not None:
        check_adapter(config.teacher_lora, "--model.teacher_lora")
        try:
            adapted = PeftModel.from_pretrained(model, config.teacher_lora)
        except Exception as error:  # whatever a library stumbles over in a stranger's file
            raise ConfigError(
                f"the adapter {config.teacher_lora} does not fit {config.teacher}",
                why=first_line(error),
            ) from None
        if config.teacher_quantization != "none":
            return adapted.eval().requires_grad_(False)
        model = adapted.merge_and_unload()
    return model.eval().requires_grad_(False)


def quantization_settings(
    kind: Literal["none", "8bit", "4bit"], dtype: torch.dtype | None
) -> BitsAndBytesConfig | None:
    """Returns how a model's linear layers are quantised; None: not at all.

    Args:
        kind: ``8bit``: LLM.int8 (Dettmers et al. 2022); ``4bit``: NF4 (Dettmers et al. 2023).
        dtype: In which 4 bits are computed with; None: float32.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if kind == "none":
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"model.teacher_quantization={kind} needs bitsandbytes, which is not installed",
            fix="bash scripts/setup.sh quant, or python -m pip install 'bitsandbytes>=0.50'",
        )
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def load_student(config: ModelConfig, *, dtype: torch.dtype) -> nn.Module:
    """Loads the student for training, with an adapter and gradient checkpointing if asked for.

    Raises:
        ConfigError: As `load_model`; an adapter whose rank is larger than the model is wide.
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
    return add_lora(model, config.student_lora).train()


def add_lora(model: PreTrainedModel, lora: LoraConfig) -> nn.Module:
    """Wraps a model in a new adapter on all its linear layers but the head; only that is trained.

    Raises:
        ConfigError: The rank is larger than the model is wide, or its layers take no adapter.
    """
    width = model.config.get_text_config().hidden_size
    if lora.r > width:
        raise ConfigError(f"model.student_lora.r={lora.r} must be in [1, {width}], the width")
    settings = PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, settings)
    except ValueError as error:  # of Mamba, whose kernels take the weights and not the layers
        raise ConfigError(
            f"model.student_lora does not go with the family {model.config.model_type!r}",
            why=first_line(error),
            fix="train the whole student: --model.student_lora null",
        ) from None


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
    teacher_tokens, student_tokens = _tokens_by_id(teacher), _tokens_by_id(student)
    ids = sorted(teacher_tokens.keys() | student_tokens.keys())
    different = [i for i in ids if teacher_tokens.get(i) != student_tokens.get(i)]
    if different:
        first = different[0]
        raise ConfigError(
            f"teacher and student tokenizers differ: {len(different)} of {len(ids)} ids differ, "
            f"first {first}: {teacher_tokens.get(first)!r} against {student_tokens.get(first)!r}",
            why="both distributions must be over the same tokens",
            fix="choose a teacher and a student of one family",
        )


def _tokens_by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}


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
