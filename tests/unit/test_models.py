"""Loading from folders: what is refused, what is frozen, and whether two models fit together."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from distilllens.config import LoraConfig, ModelConfig
from distilllens.errors import ConfigError
from distilllens.families import find_parts, run_body
from distilllens.lens import LogitLens
from distilllens.model_files import check_adapter
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
    assert "checkpoints/README.md" in caught.value.fix


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
    load_model(str(folder))  # beside safetensors it is not read
    (folder / "model.safetensors").unlink()
    told = refused(load_model, folder)
    assert told == "pytorch_model.bin is a pickle, which could run code; only safetensors are read"


def add_code(folder: Path, marker: Path, family: str) -> None:
    """Makes a folder ask for code of its own, which would leave a marker."""
    code = f"open({str(marker)!r}, 'w').close()\nraise ImportError('the code ran')\n"
    (folder / "own.py").write_text(code)
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    edit_json(folder / "config.json", model_type=family, auto_map=names)
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Tok", None]})


@pytest.mark.parametrize("load", LOADERS)
def test_code_in_a_model_folder_does_not_run(
    load: Callable[[str], object], folder: Path, tmp_path: Path
) -> None:
    add_code(folder, tmp_path / "it-ran", "made-up")
    told = refused(load, folder)
    assert "asks to run Python code: auto_map=" in told and told.endswith("nothing of it ran")
    assert not (tmp_path / "it-ran").exists()


def test_code_of_a_family_that_the_library_knows_is_left_alone(
    folder: Path,
    tmp_path: Path,
    tiny_gpt2: Callable[..., GPT2LMHeadModel],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Folders of Phi-3 and others bring code of a time when the library did not know them."""
    add_code(folder, tmp_path / "it-ran", "gpt2")
    before = set(sys.modules)
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    assert type(model) is GPT2LMHeadModel
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, tiny_gpt2()(IDS).logits)
    assert not (tmp_path / "it-ran").exists()
    assert not any("own" in name.split(".") for name in set(sys.modules) - before)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2  # each file once, however often it is read
    for line, name, native in zip(
        told, ("config", "tokenizer_config"), ("GPT2LMHeadModel", "Tokenizer"), strict=True
    ):
        assert f"{folder}/{name}.json: auto_map is ignored and its code does not run" in line
        assert native in line
    model.save_pretrained(tmp_path / "exported")
    tokenizer.save_pretrained(tmp_path / "exported")
    for file in (tmp_path / "exported").glob("*.json"):
        assert "auto_map" not in json.loads(file.read_text()), file.name


@pytest.mark.parametrize("names", [7, "own.Config", ["own.Config"]])
def test_a_code_map_that_is_none_is_refused(folder: Path, names: object) -> None:
    edit_json(folder / "config.json", auto_map=names)
    assert "asks to run Python code: auto_map=" in refused(load_model_config, folder)


@pytest.mark.parametrize("native", ["OwnTokenizer", None, 7])
def test_a_tokenizer_that_only_its_code_knows_is_refused(folder: Path, native: object) -> None:
    """The library would take tokenizer.json instead, which may cut texts in another way."""
    edit_json(
        folder / "tokenizer_config.json",
        tokenizer_class=native,
        auto_map={"AutoTokenizer": ["own.Tok", None]},
    )
    assert "asks to run Python code: auto_map=" in refused(load_tokenizer, folder)


@pytest.mark.parametrize("family", ["gpt2", "made-up"])
def test_code_runs_where_it_is_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """The control of the tests above: the marker would have shown it."""
    cache = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
    monkeypatch.setattr("sys.path", [*sys.path])
    add_code(folder, tmp_path / "it-ran", family)
    with pytest.raises(ConfigError, match="the code ran"):
        load_model_config(str(folder), trust_remote_code=True, revision="main")
    assert (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_kernels_of_a_hub_repository_are_code_too(folder: Path, key: str) -> None:
    edit_json(folder / "config.json", **{key: "somebody/kernel"})
    assert f"Python code: {key}='somebody/kernel'" in refused(load_model_config, folder)
    edit_json(folder / "config.json", **{key: "sdpa"})
    load_model_config(str(folder))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"n_layer": 10**9}, "config.json: n_layer=1000000000 must be at most 2,000"),
        ({"num_labels": 10**9}, "config.json: num_labels=1000000000 must be at most 2,000"),
        ({"a": {"b": [{"num_experts": 10**5}]}}, "num_experts=100000 must be at most 2,000"),
        ({"n_layer": -1}, "num_hidden_layers=-1 must be a whole number in [1, 2,000]"),
        ({"vocab_size": 10**8}, "vocab_size=100000000 must be a whole number in [1, 10,000,000]"),
        ({"n_embd": 10**7}, "hidden_size=10000000 must be a whole number in [1, 1,000,000]"),
        ({"n_positions": float("nan")}, "config.json: n_positions=NaN is no number"),
    ],
)
def test_sizes_that_no_model_has(folder: Path, changes: dict[str, object], told: str) -> None:
    """A library would make an object for each before it looks at the weights."""
    edit_json(folder / "config.json", **changes)
    start = time.monotonic()
    assert told in refused(load_model_config, folder)
    assert time.monotonic() - start < 1


def test_more_weights_than_the_files_hold(folder: Path) -> None:
    """Some of 10 GB would be made at random before the library tells that they are lacking."""
    edit_json(folder / "config.json", n_embd=2000, n_layer=50)
    told = refused(load_model, folder)
    assert re.search(
        r"asks for 2,4\d\d,\d{3},\d{3} weights, the files hold 2\d\d,\d{3} bytes", told
    )


def test_numbers_that_models_do_have(folder: Path) -> None:
    """Written by libraries: 1e30 as an integer, infinity, a layer counted from the end."""
    edit_json(
        folder / "config.json", max_time=float("inf"), feature_layer=-2, mask=-(10**9), top=10**30
    )
    assert load_tokenizer(str(folder)).model_max_length > 10**29
    load_model(str(folder))


def test_families_that_predict_no_next_token(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "clip"}')
    assert refused(load_model_config, folder) == "clip is no causal language model"


@pytest.mark.parametrize("load", [load_model_config, load_tokenizer])
def test_the_option_is_named(load: Callable[..., object], folder: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "gone", tmp_path, folder / "config.json"):
        with pytest.raises(ConfigError) as caught:
            load(str(path), option="--model.teacher")
        assert caught.value.fix.endswith("give another --model.teacher")


@pytest.mark.parametrize("name", ["best", "latest"])
def test_a_run_for_its_model(folder: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    folder.rename(run / name)
    with pytest.raises(ConfigError, match=r"run holds no tokenizer_config\.json") as caught:
        load_tokenizer(f"{run}/", option="--checkpoint")
    assert caught.value.fix == f"give --checkpoint {run / name}"
    assert "folder of a run" in caught.value.why
    with pytest.raises(ConfigError, match="adapter_config") as caught:
        check_adapter(str(run), "--teacher_lora")
    assert caught.value.fix.endswith("give another --teacher_lora")
    assert "adapter_model.safetensors" in caught.value.why


def test_a_home_is_asked_for_in_full(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some libraries read ~ as a home, and some do not."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for load in LOADERS:
        with pytest.raises(ConfigError, match="model folder ~/model not found") as caught:
            load("~/model")
        assert caught.value.fix == f"give the path in full, {folder}"
    with pytest.raises(ConfigError, match="adapter folder ~/model not found"):
        check_adapter("~/model", "--model.teacher_lora")


@pytest.mark.parametrize("path", ["x" * 300, "~nobody-of-that-name/model"])
def test_paths_that_cannot_be(path: str) -> None:
    with pytest.raises(ConfigError, match=f"model folder {path[:100]}.* not found"):
        load_model(path)


def test_an_id_beyond_the_embeddings(folder: Path) -> None:
    """It would end a run with an index error at the first record that has the token."""
    edit_json(folder / "tokenizer_config.json", eos_token="<end>")
    with pytest.raises(ConfigError, match=r"token '<end>' with id 300, the model has 300 rows"):
        load_tokenizer(str(folder))


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


QUANTISED = {"8bit": (0.35, 0.05), "4bit": (0.25, 0.35)}
"""Largest share of a block's bytes that is left, and relative error of the last hidden states."""


def held_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


@pytest.mark.parametrize("bits", QUANTISED)
@pytest.mark.parametrize("family", ["tiny_gpt2", "tiny_llama", "tiny_qwen2"])
def test_quantised_teacher(
    tmp_path: Path, family: str, bits: Any, request: pytest.FixtureRequest
) -> None:
    """GPT-2 has Conv1D for linear layers; Llama's head is its own, the others' are tied."""
    build: Callable[..., PreTrainedModel] = request.getfixturevalue(family)
    full = build(n_embd=128)
    full.save_pretrained(tmp_path)
    config = ModelConfig(teacher=str(tmp_path), teacher_quantization=bits)
    teacher = load_teacher(config, dtype=torch.float32)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    parts, whole = find_parts(teacher), find_parts(full)
    most_bytes, most_error = QUANTISED[bits]
    assert held_bytes(parts.blocks) < most_bytes * held_bytes(whole.blocks)
    assert torch.equal(parts.head.weight, whole.head.weight)
    for name, parameter in parts.final_norm.named_parameters():
        assert torch.equal(parameter, whole.final_norm.get_parameter(name))
    with torch.no_grad():
        hidden, expected = (run_body(p, IDS)[0] for p in (parts, whole))
    assert 1e-4 < ((hidden - expected).norm() / expected.norm()).item() < most_error
    LogitLens(teacher).self_check(IDS)


@pytest.mark.parametrize("bits", QUANTISED)
def test_quantised_teacher_keeps_its_adapter(
    tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM], bits: Any
) -> None:
    """Beside the rounded layers, in its own precision: it is in the output, and exactly."""
    tiny_llama(n_embd=128).save_pretrained(tmp_path / "base")
    settings = PeftLoraConfig(r=3, lora_alpha=6, target_modules="all-linear")
    adapted = get_peft_model(tiny_llama(n_embd=128), settings).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    config = ModelConfig(
        teacher=str(tmp_path / "base"),
        teacher_lora=str(tmp_path / "adapter"),
        teacher_quantization=bits,
    )
    teacher = load_teacher(config, dtype=torch.float32)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    stored = {name: p for name, p in teacher.named_parameters() if "lora_" in name}
    assert stored and all(torch.equal(p, adapted.get_parameter(n)) for n, p in stored.items())
    with torch.no_grad():
        hidden, expected = (run_body(find_parts(m), IDS)[0] for m in (teacher, adapted))
        plain = load_teacher(dataclasses.replace(config, teacher_lora=None), dtype=torch.float32)
        without = run_body(find_parts(plain), IDS)[0]
    error, effect = ((h - expected).norm() / expected.norm() for h in (hidden, without))
    assert error < QUANTISED[bits][1] and effect > 2 * error
    LogitLens(teacher).self_check(IDS)


def test_quantisation_needs_bitsandbytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    config = ModelConfig(teacher=str(folder), teacher_quantization="4bit")
    with pytest.raises(ConfigError, match="4bit needs bitsandbytes") as caught:
        load_teacher(config, dtype=torch.float32)
    assert "scripts/setup.sh quant" in caught.value.fix


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


@pytest.mark.parametrize("kind", ["pickle", "decoy", "module", "broken", "hub name"])
def test_adapters_that_are_refused(folder: Path, tmp_path: Path, kind: str) -> None:
    adapter, student = tmp_path / "adapter", ModelConfig(student=str(folder))
    adapted = get_peft_model(
        load_model(str(folder)), PeftLoraConfig(r=1, target_modules="all-linear")
    )
    adapted.save_pretrained(str(adapter))
    path, told = str(adapter), f"cannot load {adapter}"
    if kind == "pickle":
        (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    elif kind == "decoy":
        weights = adapter / "adapter_model.safetensors"
        (adapter / "other.safetensors").write_bytes(weights.read_bytes())
        weights.rename(adapter / "adapter_model.bin")
        told = r"holds no adapter_model\.safetensors"
    elif kind == "module":
        edit_json(adapter / "adapter_config.json", megatron_config={}, megatron_core="antigravity")
    elif kind == "broken":
        edit_json(adapter / "adapter_config.json", peft_type=7)
        told = "does not fit"
    else:
        path, told = "somebody/adapter", "adapter folder somebody/adapter not found"
    config = dataclasses.replace(student, teacher=str(folder), teacher_lora=path)
    with pytest.raises(ConfigError, match=told):
        load_teacher(config, dtype=torch.float32)


def test_a_rank_beyond_the_width(folder: Path) -> None:
    """10⁹ would ask for the memory of 10⁹ rows."""
    config = ModelConfig(student=str(folder), student_lora=LoraConfig(r=10**9))
    with pytest.raises(ConfigError, match=r"student_lora\.r=1000000000 must be in \[1, 32\]"):
        load_student(config, dtype=torch.float32)


def test_layers_that_take_no_adapter(tmp_path: Path) -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=2))
    model.save_pretrained(tmp_path)
    config = ModelConfig(student=str(tmp_path), student_lora=LoraConfig(r=2))
    with pytest.raises(ConfigError, match="does not go with the family 'mamba'") as caught:
        load_student(config, dtype=torch.float32)
    assert caught.value.why and "--model.student_lora null" in caught.value.fix


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


def test_ids_with_gaps_are_compared_too() -> None:
    """Four thousand million ids of nothing must neither be listed nor hide a difference."""
    first, second = words("<u>", "a"), words("<u>", "a")
    ids = {"<u>": 0, "a": 1}
    first.get_vocab = lambda: ids | {"far": 2**32 - 2}  # type: ignore[method-assign]
    second.get_vocab = lambda: ids | {"away": 2**32 - 2}  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="1 of 3 ids differ, first 4294967294: 'far' against"):
        check_same_tokens(first, second)


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
