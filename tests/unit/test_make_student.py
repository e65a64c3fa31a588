"""Students of a teacher's own blocks: the right blocks, the rest unchanged, loadable anywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from distilllens.cli.make_student import make_student_main
from distilllens.commands.make_student import build_student
from distilllens.errors import ConfigError
from distilllens.families import find_parts

INPUT_BT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(n_layer=5, n_embd=16, n_head=2, vocab_size=40))


def llama() -> PreTrainedModel:
    config = LlamaConfig(
        num_hidden_layers=5, hidden_size=16, intermediate_size=24, num_attention_heads=2,
        vocab_size=40,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tied_qwen2() -> PreTrainedModel:
    config = Qwen2Config(
        num_hidden_layers=5, hidden_size=16, intermediate_size=24, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=40, tie_word_embeddings=True,
        layer_types=["full_attention"] * 5,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def skip_blocks(model: PreTrainedModel, kept: list[int]) -> Tensor:
    """Oracle: the model's own logits with the blocks that go made to do nothing, by hooks."""
    blocks = find_parts(model).blocks
    gone = [block for i, block in enumerate(blocks, start=1) if i not in kept]

    def pass_input(_: object, args: tuple[Tensor, ...], output: object) -> object:
        return (args[0], *output[1:]) if isinstance(output, tuple) else args[0]

    handles = [block.register_forward_hook(pass_input) for block in gone]
    logits_BTV = model(input_ids=INPUT_BT, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits_BTV


@pytest.mark.parametrize("build", [gpt2, llama, tied_qwen2])
@pytest.mark.parametrize("layers", [[1, 3, 5], [2], [1, 2, 3, 4, 5]])
@torch.inference_mode()
def test_student_is_the_teacher_without_the_other_blocks(
    build: Callable[[], PreTrainedModel], layers: list[int]
) -> None:
    torch.manual_seed(0)
    teacher = build().eval()
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    student: Any = build_student(teacher, layers)
    expected_BTV = skip_blocks(teacher, layers)
    torch.testing.assert_close(student(input_ids=INPUT_BT).logits, expected_BTV, rtol=0, atol=1e-6)
    assert student.config.num_hidden_layers == len(layers)
    for name, weight in teacher.state_dict().items():
        assert torch.equal(weight, before[name])
    # It generates with a cache, so the blocks know their new numbers.
    generated = student.generate(INPUT_BT, max_new_tokens=3, do_sample=False, use_cache=True)
    plain = student.generate(INPUT_BT, max_new_tokens=3, do_sample=False, use_cache=False)
    assert torch.equal(generated, plain)


@pytest.mark.parametrize(
    ("layers", "message"),
    [([0, 2], r"\[0\]"), ([2, 6], r"\[6\]"), ([], "none"), ([2, 2], "increase"), ([3, 1], "incre")],
)
def test_wrong_layers_are_named(layers: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_student(gpt2(), layers)


def save_teacher(folder: Path) -> None:
    gpt2().save_pretrained(folder)
    vocabulary = {f"t{i}": i for i in range(39)} | {"<eos>": 39}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="t0"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="t0"
    ).save_pretrained(folder)


def test_command_writes_a_folder_that_transformers_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_teacher(tmp_path / "teacher")
    out = tmp_path / "deep" / "student"
    arguments = ["--teacher", str(tmp_path / "teacher"), "--layers", "1,5", "--out", str(out)]
    assert make_student_main(arguments) == 0
    assert "2 blocks" in capsys.readouterr().out
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    student, report = loaded
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    last = [find_parts(model).blocks[-1].state_dict() for model in (teacher, student)]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])
    assert (out / "tokenizer.json").is_file()
    assert list(out.parent.iterdir()) == [out]
    with pytest.raises(ConfigError, match="there already"):
        make_student_main(arguments)
