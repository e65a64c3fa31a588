"""Shared fixtures: offline, one thread, and tiny random models and tokenizers built in-process."""

from __future__ import annotations

import os

# Before torch, tokenizers and huggingface_hub are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import json
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jaxtyping
import pytest
import torch
from jaxtyping import install_import_hook
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

torch.set_num_threads(1)
# Shapes and dtypes in annotations are checked here, and only here.
install_import_hook(["distilllens.divergence", "distilllens.fused"], "beartype.beartype")
# The first vectorised log of a process is sometimes wrong by 4e-5 (pytorch issue 188792).
torch.log(torch.rand(4096) + 0.5)
torch.exp(torch.rand(4096))

if os.environ.get("KERNEL_ON_CPU") == "1":  # of test_fused_kernel.py, with TRITON_INTERPRET=1
    from distilllens.kernels import chunks

    chunks.KERNEL_ON["cpu"] = True


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked long too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="bash scripts/test.sh --long runs it"))


EOS = "<|endoftext|>"
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
"""Real data beside the checkout, where there is any."""

TINY_CORPUS = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.",
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context.",
    "### Instruction:\nSort the words: pear, apple, fig.\n\n### Input:\nThe quick brown fox.\n\n"
    "### Response:\nThe answer is apple, fig, pear.",
)


def build_bpe(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE as GPT-2's: every text has ids, the last special token is EOS."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[EOS],
        show_progress=False,
    )
    backend.train_from_iterator(TINY_CORPUS, trainer=trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)


@pytest.fixture(scope="session")
def build_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Factory of new tokenizers, for tests that change theirs: ``build_tokenizer(280)``."""
    return build_bpe


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens with an EOS token and, as GPT-2, without a pad token."""
    return build_bpe()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real instruction data; the test skips where there is none."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs real instruction data in {SHARED_DATA.parent.name}/data beside it")
    return SHARED_DATA


@pytest.fixture(scope="session")
def tiny_gpt2() -> Callable[..., GPT2LMHeadModel]:
    """Factory of random GPT-2 models in eval mode: ``tiny_gpt2(n_layer=4, seed=1)``."""

    def build(
        vocab: int = 300,
        n_layer: int = 3,
        n_embd: int = 32,
        n_head: int = 4,
        n_positions: int = 128,
        seed: int = 0,
    ) -> GPT2LMHeadModel:
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=vocab,
            n_layer=n_layer,
            n_embd=n_embd,
            n_head=n_head,
            n_positions=n_positions,
            bos_token_id=0,
            eos_token_id=0,
        )
        return GPT2LMHeadModel(config).eval()

    return build


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """Factory of random Llama models (untied head) in eval mode."""

    def build(
        vocab: int = 300,
        n_layer: int = 3,
        n_embd: int = 32,
        n_head: int = 4,
        n_positions: int = 128,
        seed: int = 0,
    ) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocab,
            num_hidden_layers=n_layer,
            hidden_size=n_embd,
            intermediate_size=2 * n_embd,
            num_attention_heads=n_head,
            num_key_value_heads=n_head // 2,
            max_position_embeddings=n_positions,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=False,
        )
        return LlamaForCausalLM(config).eval()

    return build


@pytest.fixture(scope="session")
def tiny_qwen2() -> Callable[..., Qwen2ForCausalLM]:
    """Factory of random Qwen2 models (tied head) in eval mode."""

    def build(
        vocab: int = 300,
        n_layer: int = 3,
        n_embd: int = 32,
        n_head: int = 4,
        n_positions: int = 128,
        seed: int = 0,
    ) -> Qwen2ForCausalLM:
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=vocab,
            num_hidden_layers=n_layer,
            hidden_size=n_embd,
            intermediate_size=2 * n_embd,
            num_attention_heads=n_head,
            num_key_value_heads=n_head // 2,
            max_position_embeddings=n_positions,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=True,
        )
        return Qwen2ForCausalLM(config).eval()

    return build


@pytest.fixture
def users_view() -> Iterator[None]:
    """Switches the annotations' checks off, as they are for users, to reach the errors behind."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


WORDS = ("red", "blue", "green", "cat", "dog", "house", "tree", "seven", "nine", "apple")


@dataclass(frozen=True)
class Workspace:
    """A folder with tiny models, records and DeepSpeed files, and the flags that use them."""

    root: Path

    def flags(self, *more: str, out: str = "run") -> list[str]:
        """Returns a short ``distill_lens`` training in float32; ``more`` wins."""
        return [
            *("--model.student", f"{self.root}/student", "--model.teacher", f"{self.root}/teacher"),
            *("--data.path", f"{self.root}/data/toy", "--data.processed", f"{self.root}/tokens"),
            *("--eval.dev_size", "12", "--eval.batch_size", "5", "--tracking.log_every", "2"),
            *("--optim.micro_batch_size", "8", "--optim.max_steps", "8", "--optim.lr", "1e-3"),
            *("--objective.lens.count", "2", "--deepspeed", self.deepspeed(1)),
            *("--run.output_dir", f"{self.root}/{out}"),
            *more,
        ]

    def deepspeed(self, stage: int, precision: str = "fp32") -> str:
        """Returns the project's DeepSpeed file of a ZeRO stage."""
        return str(PROJECT / "configs" / "deepspeed" / f"zero{stage}_{precision}.json")


PROJECT = Path(__file__).resolve().parents[1]


def write_records(path: Path, count: int, seed: int = 0) -> None:
    """Writes ``count`` records of a toy task: sort three words."""
    generator = random.Random(seed)
    lines = []
    for _ in range(count):
        words = generator.sample(WORDS, 3)
        record = {
            "instruction": f"Sort: {' '.join(words)}",
            "input": "",
            "output": " ".join(sorted(words)),
        }
        lines.append(json.dumps(record))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def workspace(
    tmp_path: Path,
    tiny_gpt2: Callable[..., GPT2LMHeadModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Workspace:
    """Tiny teacher (6 blocks) and student (3, no dropout), 60 records and 10 for tests."""
    for name, size, seed in (("teacher", 6, 1), ("student", 3, 2)):
        model = tiny_gpt2(n_layer=size, n_embd=8 * size, n_head=2, seed=seed)
        model.config.update({"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0})
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    write_records(tmp_path / "data/toy/raw.jsonl", 60)
    write_records(tmp_path / "data/toy/valid.jsonl", 10, seed=1)
    return Workspace(tmp_path)


def add_dropout(workspace: Workspace) -> None:
    """Makes the random state count."""
    model = GPT2LMHeadModel.from_pretrained(workspace.root / "student")
    model.config.update({"resid_pdrop": 0.1})
    model.save_pretrained(workspace.root / "student")


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends this process SIGTERM as soon as an optimizer step is done."""
    from distilllens.tracking import Tracker  # after the import hook above

    advance = Tracker.advance

    def advance_and_stop(self: Tracker, now: int) -> None:
        advance(self, now)
        if now == step:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Tracker, "advance", advance_and_stop)
