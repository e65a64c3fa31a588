"""Loading from folders: what is refused, what is frozen, and whether two models fit together."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from distilllens.config import LoraConfig, ModelConfig
from distilllens.errors import ConfigError
from distilllens.models import (
    check_same_tokens,
    load_model,
    load_model_config,
    load_student,
    load_teacher,
    load_tokenizer,
    num_blocks,
    shared_vocab_size,
    vocab_rows,
)

IDS = torch.tensor([[5, 17, 200, 3]])


@pytest.fixture
def folder(
    tmp_path: Path,
    tiny_gpt2: Callable[..., GPT2LMHeadModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A model folder with everything in it."""
    tiny_gpt2().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def words(*tokens: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<u>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- Loading ------------------------------------------------------------------------------------


def test_a_folder_loads(folder: Path, tiny_gpt2: Callable[..., GPT2LMHeadModel]) -> None:
    model = load_model(str(folder))
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, tiny_gpt2()(IDS).logits)
    config = load_model_config(str(folder))
    assert (num_blocks(config), vocab_rows(config)) == (3, 300)
    assert load_tokenizer(str(folder)).eos_token == "<|endoftext|>"


def test_dtype(folder: Path) -> None:
    assert load_model(str(folder)).dtype == torch.float32
    load_model(str(folder), dtype=torch.bfloat16).save_pretrained(folder)
    assert load_model(str(folder)).dtype == torch.bfloat16  # as stored
    assert load_model(str(folder), dtype=torch.float32).dtype == torch.float32


LOADERS: list[Callable[[str], object]] = [load_model, load_model_config, load_tokenizer]


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("name", ["checkpoints/gone", "gone"])
def test_missing_folder(load: Callable[[str], object], name: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    path, start = str(tmp_path / name), time.monotonic()
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert time.monotonic() - start < 2
    assert caught.value.what == f"model folder {path} not found"
    assert "--model" in caught.value.fix or "model.student" in caught.value.fix


def test_relative_paths_are_folders_where_their_parent_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else `checkpoints/gpt2` would be looked for on the hub."""
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("checkpoints/gone", "./gone", "a/b/gone"):
        with pytest.raises(ConfigError, match=f"model folder {name} not found"):
            load_model(name)


def test_hub_name_while_offline() -> None:
    start = time.monotonic()
    with pytest.raises(ConfigError, match="nobody-here/gone not found locally, nor on the hub"):
        load_model("nobody-here/gone")
    assert time.monotonic() - start < 10


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json is a file, not a model folder"):
        load_model(str(folder / "config.json"))


def test_folders_that_hold_no_model(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        load_model(str(folder))
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match=r"holds no tokenizer_config\.json"):
        load_tokenizer(str(folder))


def refused(load: Callable[[str], object], folder: Path) -> str:
    """Returns why a folder is refused, without a traceback of a library."""
    with pytest.raises(ConfigError) as caught:
        load(str(folder))
    assert caught.value.what == f"cannot load {folder}"
    return caught.value.why


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": "no-such-family"}'])
def test_broken_config(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    assert refused(load_model_config, folder) and refused(load_model, folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_broken_tokenizer(folder: Path, name: str) -> None:
    (folder / name).write_text("{")
    assert refused(load_tokenizer, folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", b"\xff" * 99],
    ids=["empty", "git-lfs pointer", "noise"],
)
def test_broken_weights(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert "header" in refused(load_model, folder)


def test_weights_cut_short(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert refused(load_model, folder)


def test_weights_of_another_shape(folder: Path) -> None:
    edit_json(folder / "config.json", n_embd=64)
    assert refused(load_model, folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    """Pickle runs code; a folder that has nothing else is no model."""
    torch.save(load_model(str(folder)).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "safetensors" in refused(load_model, folder)


@pytest.mark.parametrize("family", ["gpt2", "made-up"])
def test_code_in_a_model_folder_does_not_run(folder: Path, tmp_path: Path, family: str) -> None:
    marker = tmp_path / "it-ran"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\nraise SystemExit(9)\n")
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    edit_json(folder / "config.json", model_type=family, auto_map=names)
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Tok", None]})
    for load in LOADERS:
        try:
            load(str(folder))
        except ConfigError as error:
            assert family == "made-up" or load is load_tokenizer, error
    assert not marker.exists()


def test_tokenizer_without_end_of_sequence(tmp_path: Path) -> None:
    words("a", "b").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has 2 tokens and eos_token=None"):
        load_tokenizer(str(tmp_path))


# --- Teacher and student ------------------------------------------------------------------------


def test_teacher_is_frozen_and_student_is_not(folder: Path) -> None:
    config = ModelConfig(student=str(folder), teacher=str(folder))
    teacher = load_teacher(config, dtype=torch.bfloat16)
    assert not teacher.training and teacher.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    student = load_student(config, dtype=torch.float32)
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_teacher_adapter_is_merged(
    tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM]
) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    settings = PeftLoraConfig(r=3, lora_alpha=6, target_modules="all-linear")
    adapted = get_peft_model(tiny_llama(), settings).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    base, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    teacher = load_teacher(ModelConfig(teacher=base, teacher_lora=adapter), dtype=torch.float32)
    with torch.no_grad():
        expected = adapted(input_ids=IDS).logits
        torch.testing.assert_close(teacher(input_ids=IDS).logits, expected)
        plain = load_teacher(ModelConfig(teacher=base), dtype=torch.float32)
        assert not torch.allclose(plain(input_ids=IDS).logits, expected, atol=1e-2)
    assert type(teacher) is LlamaForCausalLM
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_adapter_that_is_missing_or_does_not_fit(
    folder: Path, tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM]
) -> None:
    missing = ModelConfig(teacher=str(folder), teacher_lora=str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match=r"gone not found"):
        load_teacher(missing, dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"holds no adapter_config\.json"):
        load_teacher(
            ModelConfig(teacher=str(folder), teacher_lora=str(folder)), dtype=torch.float32
        )
    other = get_peft_model(tiny_llama(), PeftLoraConfig(r=1, target_modules=["q_proj"]))
    other.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(ConfigError, match=rf"adapter does not fit {folder}"):
        load_teacher(
            ModelConfig(teacher=str(folder), teacher_lora=str(tmp_path / "adapter")),
            dtype=torch.float32,
        )


def test_student_adapter(tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    tiny_llama().save_pretrained(tmp_path)
    lora = LoraConfig(r=2, alpha=5.0, dropout=0.25)
    student = load_student(
        ModelConfig(student=str(tmp_path), student_lora=lora), dtype=torch.float32
    )
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    # q, k, v, o, gate, up, down: two factors in each of three blocks; never the head
    assert len(trained) == 3 * 7 * 2
    assert all("lora_" in name and "lm_head" not in name for name in trained)
    layer = student.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert layer.lora_A["default"].weight.shape == (2, 32)  # type: ignore[index, union-attr]
    assert layer.scaling["default"] == 2.5  # type: ignore[index]
    assert layer.lora_dropout["default"].p == 0.25  # type: ignore[index, union-attr]


# --- Vocabularies -------------------------------------------------------------------------------


def test_equal_tokenizers_pass() -> None:
    check_same_tokens(words("<u>", "a", "b"), words("<u>", "a", "b"))


@pytest.mark.parametrize(
    ("student", "told"),
    [
        (("<u>", "a", "c", "b"), "2 of 4 ids differ, first 2: 'b' against 'c'"),
        (("<u>", "a"), "2 of 4 ids differ, first 2: 'b' against None"),
        (("<u>", "a", "b", "c", "d"), "1 of 5 ids differ, first 4: None against 'd'"),
        (("x", "a", "b", "c"), "1 of 4 ids differ, first 0: '<u>' against 'x'"),
    ],
)
def test_tokenizers_that_differ(student: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        check_same_tokens(words("<u>", "a", "b", "c"), words(*student))
    assert caught.value.exit_code == 2


def test_padding_is_cut_from_the_vocabulary() -> None:
    assert shared_vocab_size(300, 300, 300) == (300, "")
    assert shared_vocab_size(320, 320, 300) == (320, "")
    assert shared_vocab_size(152_064, 151_936, 151_665) == (
        151_936,
        "teacher vocabulary 152064 cut to 151936 (padding, no tokens)",
    )
    assert shared_vocab_size(300, 304, 300) == (
        300,
        "student vocabulary 304 cut to 300 (padding, no tokens)",
    )


@pytest.mark.parametrize(("teacher", "student"), [(299, 300), (300, 299), (299, 299)])
def test_tokens_are_not_cut(teacher: int, student: int) -> None:
    told = f"has 300 tokens, but the teacher's head has {teacher} rows and the student's {student}"
    with pytest.raises(ConfigError, match=told):
        shared_vocab_size(teacher, student, 300)


def test_missing_weights_are_refused(folder: Path) -> None:
    edit_json(folder / "config.json", n_layer=4)
    assert refused(load_model, folder)
