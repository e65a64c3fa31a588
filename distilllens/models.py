"""Loading: tokenizer, frozen teacher, student with or without LoRA; and whether they fit.

Model folders come from strangers. Their JSON is read here before a library acts on it: code of
their own, pickles and sizes that no model has are refused, and nothing of them runs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
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
LARGEST_SETTINGS = 10_000_000
"""Bytes of a config.json; the largest have some 100,000, most of it names of labels."""
DEEPEST_SETTINGS = 30
"""Levels of nesting in it."""
COUNTS = re.compile(r"(layers?|labels|experts|blocks)$")
"""Names of numbers of parts, of which a library makes an object each: 10⁹ fill the memory."""
MOST_PARTS = 2_000
LARGEST_SIZES = {
    "num_hidden_layers": MOST_PARTS,
    "hidden_size": 1_000_000,
    "vocab_size": 10_000_000,
}
LONGEST_REASON = 300
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def load_model_config(
    path: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> PretrainedConfig:
    """Loads a model's configuration without its weights.

    Raises:
        ConfigError: The folder is not there, is no model folder, or is a hub name while offline;
            its config.json is broken, asks for code of its own without ``trust_remote_code``, has
            sizes that no model has, or is of a family that predicts no next token.
    """
    offline = _check_source(path, "config.json", revision)
    _check_settings(path, "config.json", trust_remote_code=trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(
            path,
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_files_only=offline,
        )
        text_config = config.get_text_config()
        sizes = {name: getattr(text_config, name, None) for name in LARGEST_SIZES}
    except Exception as error:  # whatever a library stumbles over in a stranger's file
        raise _unloadable(path, error, "config.json") from None
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
    path: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer beside a model.

    Raises:
        ConfigError: Not there or broken; it asks for code of its own without
            ``trust_remote_code``, knows no tokens or no end-of-sequence token, or has ids that the
            model beside it has no rows for.
    """
    offline = _check_source(path, "tokenizer_config.json", revision)
    _check_settings(path, "tokenizer_config.json", trust_remote_code=trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_files_only=offline,
        )
    except Exception as error:  # whatever a library stumbles over in a stranger's file
        raise _unloadable(path, error, "its tokenizer") from None
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
        raise _unloadable(path, error, "its tokenizer") from None
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
    _check_weights(path)
    _check_amount(path, config, trust_remote_code=trust_remote_code)
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
    except Exception as error:  # whatever a library stumbles over in a stranger's file
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
        _check_adapter(config.teacher_lora)
        try:
            adapted = PeftModel.from_pretrained(model, config.teacher_lora)
        except Exception as error:  # whatever a library stumbles over in a stranger's file
            raise ConfigError(
                f"the adapter {config.teacher_lora} does not fit {config.teacher}",
                why=_first_line(error),
            ) from None
        model = adapted.merge_and_unload()
    return model.eval().requires_grad_(False)


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
        ConfigError: The rank is larger than the model is wide.
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


def _check_folder(path: str, *must_hold: str) -> None:
    """Refuses at once what is meant as a local folder and is not one."""
    try:
        folder = Path(path).expanduser()
        is_folder, is_there = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError) as error:  # too long a name; a home of nobody
        raise ConfigError(f"model folder {path[:100]} not found", why=str(error)[:100]) from None
    if is_folder:
        if lacking := [name for name in must_hold if not (folder / name).is_file()]:
            raise ConfigError(
                f"{path} holds no {lacking[0]}",
                why="a model folder has config.json, tokenizer files and model.safetensors",
            )
        return
    if is_there:
        raise ConfigError(f"{path} is a file, not a model folder")
    looks_local = path.startswith((".", "/", "~")) or folder.parent.is_dir()
    if looks_local or path.count("/") > 1:
        raise ConfigError(
            f"model folder {path} not found",
            fix="put a Hugging Face model folder there (checkpoints/README.md says how), "
            "or change model.student / model.teacher",
        )


def _check_adapter(path: str) -> None:
    """Refuses adapters that are not there, are pickled, or name a module to import."""
    _check_folder(path, "adapter_config.json")
    if not Path(path).is_dir():
        raise ConfigError(f"adapter folder {path} not found", fix="change model.teacher_lora")
    _check_weights(path)
    _check_folder(path, "adapter_model.safetensors")  # else the library takes adapter_model.bin
    settings = _check_settings(path, "adapter_config.json", trust_remote_code=False)
    if settings.get("megatron_config") is not None:
        raise ConfigError(f"cannot load {path}", why="megatron_config names a module to import")


def _check_weights(path: str) -> None:
    """Refuses a folder whose weights are pickles: loading one can run any code."""
    folder = Path(path)
    names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise ConfigError(
            f"cannot load {path}",
            why=f"{pickles[0]} is a pickle, which could run code; only safetensors are read",
            fix="if you trust where it comes from, load it with transformers on a machine that "
            "may be lost and write it again with save_pretrained, which makes safetensors",
        )


def _check_amount(path: str, config: PretrainedConfig, *, trust_remote_code: bool) -> None:
    """Refuses a config.json that asks for far more weights than the folder's files can hold.

    A library would make the lacking ones at random before it tells, and be killed for memory.
    """
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:  # a hub name, or nothing to load: the library says so
        return
    try:
        for file in files:
            with safe_open(file, framework="pt"):  # reads the header, which may be broken
                pass
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a library stumbles over in a stranger's file
        raise _unloadable(path, error) from None
    stored = sum(file.stat().st_size for file in files)
    wanted = sum(parameter.numel() for parameter in model.parameters())
    if wanted / 2 > stored:  # half a byte: 4 bits are the fewest that a weight is stored in
        raise ConfigError(
            f"cannot load {path}",
            why=f"config.json asks for {wanted:,} weights, the files hold {stored:,} bytes",
        )


def _check_settings(path: str, name: str, *, trust_remote_code: bool) -> dict[str, Any]:
    """Reads a JSON file of a model folder and refuses what would harm; of a hub name: nothing.

    Raises:
        ConfigError: Not a JSON object; nested too deeply, numbers that no model has; code of the
            folder's own or of a hub repository, unless it is trusted.
    """
    file = Path(path).expanduser() / name
    if not file.is_file():
        return {}
    try:
        if file.stat().st_size > LARGEST_SETTINGS:
            raise ValueError(f"{file.stat().st_size:,} bytes are no {name}")
        settings = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it is no JSON object")
        for key, value in _nested(settings):
            _check_setting(key, value)
    except RecursionError:
        raise ConfigError(f"cannot load {path}", why=f"{name} is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load {path}", why=f"{name}: {_first_line(error)}") from None
    if not trust_remote_code and (code := _foreign_code(settings)):
        raise ConfigError(
            f"cannot load {path}",
            why=f"{name} asks to run Python code: {code}; nothing of it ran",
            fix="if the library knows the family itself, delete that entry; else read the code, "
            "then --model.trust_remote_code true --model.revision COMMIT",
        )
    return settings


def _foreign_code(settings: dict[str, Any]) -> str:
    """Names the entry that would run Python code of a folder or of a hub repository, if any."""
    for key, value in _nested(settings):
        is_kernel = key.endswith("_implementation") and isinstance(value, str) and "/" in value
        if (key == "auto_map" and value) or is_kernel:
            return f"{key}={value!r:.100}"
    return ""


def _check_setting(key: str, value: Any) -> None:
    """Refuses one value of a config.json.

    Raises:
        ValueError: It is a number that no model has.
    """
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{key:.60}=NaN is no number")
    if isinstance(value, int) and COUNTS.search(key) and value > MOST_PARTS:
        raise ValueError(f"{key:.60}={value} must be at most {MOST_PARTS:,}")


def _nested(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields every key with its value, at all depths; an item of a list has the list's key.

    Raises:
        ValueError: Nested more deeply than any model's file.
    """
    level: list[tuple[str, Any]] = list(settings.items())
    for _ in range(DEEPEST_SETTINGS):
        yield from level
        below: list[tuple[str, Any]] = []
        for key, value in level:
            if isinstance(value, dict):
                below += value.items()
            elif isinstance(value, list):
                below += [(key, item) for item in value]
        level = below
    if level:
        raise ValueError("it is nested too deeply")


def _unloadable(path: str, error: Exception, part: str = "") -> ConfigError:
    reason = f"{part}: {_first_line(error)}" if part else _first_line(error)
    if Path(path).is_dir():
        return ConfigError(f"cannot load {path}", why=reason)
    return ConfigError(
        f"{path:.200} not found locally, nor on the hub",
        why=reason,
        fix="download it into checkpoints/ on a machine with network access",
    )


def _first_line(error: Exception) -> str:
    """Returns the first line of a message, with the next ones while they only announce it."""
    text, *more = [line.strip() for line in str(error).strip().splitlines()] or [""]
    while text.endswith(":") and more:
        text += f" {more.pop(0)}"
    text = text[:LONGEST_REASON]
    # Of an error that was not made to be read, the message alone says little: 'layers'.
    readable = isinstance(error, (OSError, ValueError, RuntimeError, ImportError))
    if text and (readable or type(error) is Exception):
        return text
    return f"{type(error).__name__}: {text}".removesuffix(": ")
