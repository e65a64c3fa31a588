"""Model cards: what they tell and never tell; the prompt that exported tokenizers make."""

from __future__ import annotations

import dataclasses
import json
import shlex
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from jinja2 import TemplateError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from distilllens.__main__ import main
from distilllens.config import (
    EvaluateConfig,
    SamplingConfig,
    dump_config,
    load_config,
    load_evaluate_config,
)
from distilllens.data.encode import encode_prompts
from distilllens.data.prompts import alpaca_prompt, chat_template
from distilllens.errors import DataError
from distilllens.evaluation.cells.provenance import checkpoint_fingerprint
from distilllens.public import public_command, public_path, public_text
from distilllens.publish import card as model_card
from distilllens.publish.card import own_licence
from distilllens.publish.card_facts import (
    CardFacts,
    count_parameters,
    facts_of_run,
    read_facts,
)
from distilllens.publish.export import (
    export_model,
    generation_settings,
    with_chat_template,
    write_model,
)
from distilllens.publish.licences import find_licence
from distilllens.runs import FACTS_FILE, RunFolder

ENGINE = SimpleNamespace(zero_optimization_partition_weights=lambda: False)
SECRET = "hf_" + "a1B2" * 8


# --- What may be published ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("checkpoints/gpt2-base", "checkpoints/gpt2-base"),
        ("checkpoints/gpt2-base/", "checkpoints/gpt2-base"),
        ("openai-community/gpt2", "openai-community/gpt2"),
        ("/home/alice/models/gpt2", "gpt2"),
        ("~/models/gpt2", "gpt2"),
        ("../alice/models/gpt2", "gpt2"),
        ("file:///home/alice/models/gpt2", "gpt2"),
        ("file://localhost/home/alice/models/gpt2", "gpt2"),
        ("/", "folder"),
        ("~", "folder"),
    ],
)
def test_paths_outside_the_project_lose_their_folders(path: str, shown: str) -> None:
    assert public_path(path) == shown


def test_paths_inside_are_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distilllens.public.PROJECT", tmp_path)
    assert public_path(f"{tmp_path}/checkpoints/a") == "checkpoints/a"
    (tmp_path / "scratch").mkdir()
    for folder in ("/", tmp_path.parent):  # below the working folder: no user's name comes through
        monkeypatch.chdir(folder)
        assert public_path("/home/alice/a") == "a"
        assert public_path(f"{tmp_path.parent}/alice/ckpt/gpt2") == "gpt2"
    monkeypatch.setattr("distilllens.public.PROJECT", Path("/"))
    assert public_path("/home/alice/a") == "a"


def test_texts_lose_paths_and_keys() -> None:
    text = public_text(f"[/home/alice/a.jsonl, x/y] https://hub.example/a/b {SECRET}")
    assert "alice" not in text and SECRET not in text
    assert "https://hub.example/a/b" in text and "x/y" in text and "a.jsonl" in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("b:/home/alice/z", "b:z"),
        ("[a:/home/alice/z, b:~/z]", "[a:z, b:z]"),
        ("see file:///home/alice/z", "see z"),
        ("see FILE://host/home/alice/z", "see z"),
        ("https://hub.example:443/a/b?c=d/e", "https://hub.example:443/a/b?c=d/e"),
        ("s3://bucket/a", "s3://bucket/a"),
    ],
)
def test_paths_behind_a_colon_are_paths(text: str, shown: str) -> None:
    assert public_text(text) == shown


def test_commands_keep_what_decides_the_training() -> None:
    typed = ["train.py", "--config", "/home/alice/own.yaml", "--run.output_dir", "/home/alice/r"]
    typed += ["--run.seed=7", "--optim.lr", "1e-3", "--run.max_wall_time=01:00:00", "--run.seed"]
    typed += ["8", "--model.teacher=/home/alice/t", "--data.packing", "true", "--debug", "true"]
    expected = "train.py --config own.yaml --run.seed=7 --optim.lr 1e-3 --run.seed 8 "
    expected += "--model.teacher=t --data.packing true"
    assert " ".join(public_command(typed)) == expected


APACHE = "\n                                 Apache License\n                           Version 2.0, January 2004\n"  # noqa: E501


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (None, "")),
        ({"README.md": "---\nlicense: apache-2.0\n---\n"}, ("apache-2.0", "README.md")),
        ({"README.md": "---\nlicense: unknown\n---\n"}, (None, "")),
        ({"README.md": "---\nlicense: [\n---\n", "LICENSE": APACHE}, ("apache-2.0", "LICENSE")),
        ({"README.md": "no head", "LICENSE": APACHE}, ("apache-2.0", "LICENSE")),
        ({"LICENSE.txt": "MIT License\n\nCopyright"}, ("mit", "LICENSE.txt")),
        ({"LICENSE": "# The MIT License (MIT)\n\nCopyright"}, ("mit", "LICENSE")),
        *[
            ({"LICENSE": text}, (None, "LICENSE there is not one known here"))
            for text in (
                "My own terms",
                "Modified MIT License\n",
                "MIT License, but not for trade\n",
                "Non-commercial terms\n\nbased on the\n" + APACHE,
                "Apache License, Version 2.0 with the Commons Clause\n",
            )
        ],
        *[
            (
                {"README.md": f"---\nlicense: {named}\n---\n", "LICENSE": APACHE},
                (None, "README.md there names no single one"),
            )
            for named in ("other", "[mit, apache-2.0]", "3")
        ],
        (
            {"LICENSE": "MIT License\n", "LICENSE-DATA": APACHE},
            (None, "texts of several there"),
        ),
        (
            {"LICENSE": "MIT License\n", "LICENSE-WEIGHTS": "Mine"},
            (None, "LICENSE-WEIGHTS there is not one known here"),
        ),
    ],
)
def test_licences_are_found_or_unknown(
    tmp_path: Path, files: dict[str, str], expected: tuple[str | None, str]
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert find_licence(tmp_path) == expected


# --- The prompt ---------------------------------------------------------------------------------

CHATS: list[tuple[list[dict[str, str]], str]] = [
    ([{"role": "user", "content": "Sort: b a"}], alpaca_prompt("Sort: b a")),
    ([{"role": "user", "content": " {{ x }} \n'\"\\ é "}], alpaca_prompt(" {{ x }} \n'\"\\ é ")),
    (
        [{"role": "system", "content": "Sort"}, {"role": "user", "content": "b\na\n"}],
        alpaca_prompt("Sort", "b\na\n"),
    ),
    (
        [{"role": "system", "content": ""}, {"role": "user", "content": "Sort"}],
        alpaca_prompt("Sort"),
    ),
    (
        [{"role": "system", "content": "Sort"}, {"role": "user", "content": ""}],
        alpaca_prompt("Sort", ""),
    ),
]


@pytest.mark.parametrize(("chat", "prompt"), CHATS)
def test_chats_make_the_prompt_of_training(
    tiny_tokenizer: PreTrainedTokenizerFast, chat: list[dict[str, str]], prompt: str
) -> None:
    chatting = with_chat_template(tiny_tokenizer)
    text = chatting.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == prompt
    encoded = chatting.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert encoded == encode_prompts(tiny_tokenizer, [prompt])[0]
    assert tiny_tokenizer.chat_template is None


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    "chat",
    [
        [USER, ASSISTANT],
        [USER, ASSISTANT, USER],
        [USER, USER],
        [{"role": "system", "content": "a"}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    ],
)
def test_other_chats_are_refused(tiny_tokenizer: Any, chat: list[dict[str, Any]]) -> None:
    chatting = with_chat_template(tiny_tokenizer)
    with pytest.raises(TemplateError, match=r"single prompts|must be a text"):
        chatting.apply_chat_template(chat, tokenize=False)


def with_special_tokens(build: Callable[..., PreTrainedTokenizerFast], single: str) -> Any:
    """Returns a tokenizer that puts tokens around a text, as Llama's puts BOS before it."""
    tokenizer = build(280)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", tokenizer.eos_token)]
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return tokenizer


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A <|endoftext|>", "$A <|endoftext|>"])
def test_special_tokens_of_a_text_stand_in_the_template(
    build_tokenizer: Callable[..., PreTrainedTokenizerFast], single: str
) -> None:
    tokenizer = with_special_tokens(build_tokenizer, single)
    prompt = alpaca_prompt("Sort: b a")
    plain = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    bos = [tokenizer.bos_token_id] if single.startswith("<s>") else []
    chatting = with_chat_template(tokenizer)
    chat = [{"role": "user", "content": "Sort: b a"}]
    encoded = chatting.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert encoded == bos + plain


def test_a_tokenizer_that_would_give_other_tokens_gets_no_template(tmp_path: Path) -> None:
    """As SentencePiece: the first word gets a space before it, but not behind a special token."""
    letters = {
        letter: number for number, letter in enumerate(sorted(set(map(chr, range(32, 127)))))
    }
    vocab = {"<s>": 0, "</s>": 1, "▁": 2, **{letter: 3 + n for letter, n in letters.items()}}
    vocab["\n"] = len(vocab)
    backend = Tokenizer(BPE(vocab, []))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template="the base's"
    )
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    assert encode_prompts(tokenizer, ["Be"])[0][:2] == [0, 2]
    chatting = with_chat_template(tokenizer)
    assert chatting.chat_template is None
    chatting.save_pretrained(tmp_path)
    assert not (tmp_path / "chat_template.jinja").exists()
    assert tokenizer.chat_template == "the base's"


def test_a_template_that_breaks_a_tokenizer_costs_no_model(
    tmp_path: Path,
    tiny_gpt2: Callable[..., GPT2LMHeadModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AttributeError("no chats here\nat all")

    monkeypatch.setattr(type(tiny_tokenizer), "apply_chat_template", fail)
    write_model(tiny_gpt2(), tiny_tokenizer, tmp_path / "m", None)
    assert load_file(tmp_path / "m/model.safetensors")
    assert (tmp_path / "m/tokenizer.json").is_file()
    assert not (tmp_path / "m/chat_template.jinja").exists()
    assert "gets no chat template: no chats here" in caplog.text


def test_template_is_one_line() -> None:
    assert "\n" not in chat_template("<s>")


def test_generation_settings(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sampling = SamplingConfig(max_new_tokens=7, no_repeat_ngram_size=0)
    plain = generation_settings(tiny_tokenizer, 300, sampling)
    assert (plain.do_sample, plain.max_new_tokens) == (False, 7)
    assert plain.eos_token_id == plain.pad_token_id == tiny_tokenizer.eos_token_id
    assert plain.suppress_tokens is None and plain.no_repeat_ngram_size is None
    padded = generation_settings(tiny_tokenizer, 303, SamplingConfig(no_repeat_ngram_size=6))
    assert padded.suppress_tokens == [300, 301, 302] and padded.no_repeat_ngram_size == 6


# --- The card -----------------------------------------------------------------------------------


@pytest.fixture
def run(
    tmp_path: Path,
    tiny_gpt2: Callable[..., GPT2LMHeadModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> RunFolder:
    """What a run of two models leaves that a card is made of."""
    monkeypatch.chdir(tmp_path)
    for name, blocks in (("teacher", 6), ("student", 3)):
        tiny_gpt2(n_layer=blocks).save_pretrained(tmp_path / "checkpoints" / name)
        tiny_tokenizer.save_pretrained(tmp_path / "checkpoints" / name)
        (tmp_path / "checkpoints" / name / "README.md").write_text("---\nlicense: mit\n---\n")
    deepspeed = Path(__file__).parents[2] / "configs/deepspeed/zero2_bf16.json"
    argv = ["--model.student", "checkpoints/student", "--model.teacher", "checkpoints/teacher"]
    argv += ["--optim.micro_batch_size", "2", "--optim.accumulation", "3", "--optim.epochs", "4"]
    argv += ["--deepspeed", str(deepspeed), "--data.path", "/home/alice/secret/dolly"]
    folder = RunFolder(tmp_path / "results/train/toy")
    folder.root.mkdir(parents=True)
    folder.config.write_text(dump_config(load_config(argv)))
    folder.data.write_text(
        json.dumps(
            {
                "fingerprint": "f" * 64,
                "train": {"used": 120, "response_tokens": 4321},
                "dev": {"used": 17},
            }
        )
    )
    environment = {
        "machine": {"world_size": 2},
        "git_commit": "c0ffee",
        "versions": {"torch": "2.13.0"},
        "command": f"train.py {' '.join(argv)} --run.output_dir /home/alice/out",
    }
    folder.environment.write_text(json.dumps(environment))
    folder.layers.write_text('[{"teacher": 2, "student": 1}, {"teacher": 4, "student": 2}]')
    return folder


def facts_of(run: RunFolder) -> CardFacts:
    facts = facts_of_run(run, load_config(["--config", str(run.config)]))
    return dataclasses.replace(facts, step=30, dev={"eval/dev/loss": 1.25})


@pytest.fixture
def best(
    run: RunFolder,
    tiny_gpt2: Callable[..., GPT2LMHeadModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """An exported student with its card."""
    export_model(ENGINE, tiny_gpt2(), tiny_tokenizer, run.best, card=facts_of(run))
    return run.best


def test_card_tells_the_training(best: Path) -> None:
    card = ModelCard.load(best / "README.md")
    assert card.data.license == "unknown" and card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["distilllens", "knowledge-distillation", "logit-lens"]
    assert card.data.base_model is None  # the folder's hub name is not known
    teacher = sum(
        p.numel() for p in GPT2LMHeadModel.from_pretrained("checkpoints/teacher").parameters()
    )
    fingerprint = checkpoint_fingerprint("checkpoints/teacher")
    for text in (
        "student taught by teacher (distill_lens, rkl)",
        *(fingerprint, f"{teacher / 1000:.2f}K", "GPT2LMHeadModel"),
        *("| teacher blocks | 2 4 |", "| student blocks | 1 2 |", "| lens weight λ | 1.0"),
        *("| training records | 120 |", "| response tokens to train on | 4,321 |", "f" * 64),
        "| optimizer steps | 30 of 40 |",  # 120 records / (2 · 3 · 2) = 10 an epoch, 4 epochs
        *("| epochs at this step | 3.00 |", "12 records: 2 × 3 accumulated × 2 processes"),
        *("| precision | bfloat16 |", "ZeRO stage 2", "`c0ffee`", "torch 2.13.0"),
        *(
            "| Loss (nats per token) | 1.25 |",
            "torchrun --nproc_per_node 2 train.py",
            "`dolly/raw.jsonl`",
        ),
        "| data | unknown: check before you publish |",
        'messages = [{"role": "user"',
    ):
        assert text in card.text, text


def test_card_names_no_user_and_no_secret(best: Path) -> None:
    for name in ("README.md", FACTS_FILE):
        text = (best / name).read_text()
        assert "alice" not in text and "/home" not in text and str(best.parents[3]) not in text


def test_card_depends_on_nothing_but_the_training(
    run: RunFolder,
    best: Path,
    tiny_gpt2: Callable[..., GPT2LMHeadModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    export_model(ENGINE, tiny_gpt2(), tiny_tokenizer, run.latest, card=facts_of(run))
    for name in ("README.md", FACTS_FILE):
        assert (best / name).read_bytes() == (run.latest / name).read_bytes()
    facts = read_facts(best)
    assert facts is not None and facts == dataclasses.replace(facts_of(run), chat="template")


def test_an_export_without_facts_has_no_card(
    tmp_path: Path, tiny_gpt2: Callable[..., GPT2LMHeadModel], tiny_tokenizer: Any
) -> None:
    write_model(tiny_gpt2(), tiny_tokenizer, tmp_path / "m", None)
    assert not (tmp_path / "m/README.md").exists()
    assert read_facts(tmp_path / "m") is None


def test_a_card_that_fails_costs_no_model(
    run: RunFolder,
    tiny_gpt2: Callable[..., GPT2LMHeadModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_card, "build_card", fail)
    export_model(ENGINE, tiny_gpt2(), tiny_tokenizer, run.best, card=facts_of(run))
    assert load_file(run.best / "model.safetensors")
    assert "card" in caplog.text and "No space left" in caplog.text


def test_licence_of_the_student(run: RunFolder) -> None:
    bare = facts_of(run)
    assert bare.teacher is not None and bare.data.licence is None
    assert own_licence(bare)[0] is None  # nobody knows the data's
    facts = dataclasses.replace(bare, data=dataclasses.replace(bare.data, licence="mit"))
    assert facts.teacher is not None
    assert own_licence(facts)[0] == "mit"
    limited = dataclasses.replace(facts.data, licence="cc-by-nc-sa-4.0")
    assert own_licence(dataclasses.replace(facts, data=limited))[0] is None
    other = dataclasses.replace(
        facts, teacher=dataclasses.replace(facts.teacher, licence="gpl-3.0")
    )
    unknown = dataclasses.replace(facts, teacher=dataclasses.replace(facts.teacher, licence=None))
    assert own_licence(other)[0] is None and own_licence(unknown)[0] is None
    said = dataclasses.replace(unknown, said=dataclasses.replace(facts.said, licence="cc-by-4.0"))
    assert own_licence(said)[0] == "cc-by-4.0"


@pytest.mark.parametrize(
    ("adapter", "data", "own"),
    [("mit", "mit", "mit"), ("llama2", "mit", "unknown"), (None, "mit", "unknown")],
)
def test_the_teachers_adapter_and_the_data_have_licences_too(
    run: RunFolder,
    tiny_gpt2: Callable[..., GPT2LMHeadModel],
    tiny_tokenizer: Any,
    adapter: str | None,
    data: str,
    own: str,
) -> None:
    for name, licence in (("adapter", adapter), ("dolly", data)):
        Path(name).mkdir()
        if licence is not None:
            Path(name, "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    argv = ["--config", str(run.config), "--model.teacher_lora", "adapter", "--data.path", "dolly"]
    facts = facts_of_run(run, load_config(argv))
    export_model(ENGINE, tiny_gpt2(), tiny_tokenizer, run.best, card=facts)
    card = ModelCard.load(run.best / "README.md")
    assert card.data.license == own
    known = adapter or "unknown: check before you publish"
    assert f"| teacher's adapter | {known} |" in card.text
    assert read_facts(run.best) == dataclasses.replace(facts, chat="template")


# --- Scores -------------------------------------------------------------------------------------


def write_result(
    folder: Path,
    seed: int,
    score: float,
    checkpoint: str,
    *,
    num: int = 50,
    identity: dict[str, Any] | None = None,
    **eval: Any,
) -> None:
    content = {
        "metrics": {"rougeL": score, "exact_match": score / 10, "num": num},
        "set": "toy",
        "seed": seed,
        "name": "toy",
        "identity": {"weights and tokenizer": checkpoint, "records": "r", **(identity or {})},
        "config": {"eval": {"temperature": 1.0, **eval}, "max_prompt_length": 256},
    }
    path = folder / f"seed{seed}" / "toy" / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))


def test_scores_of_these_weights_alone(run: RunFolder, best: Path) -> None:
    evaluations = Path("results/eval_main/toy")
    values = {10: 20.5, 20: 21.0, 30: 22.25}
    own = checkpoint_fingerprint(str(best))
    for seed, value in values.items():
        write_result(evaluations, seed, value, own)
    write_result(Path("results/eval_main/toy/other"), 10, 99.0, "another model's")
    assert main(["card", str(best), "--language", "en", "--base_model", "openai/small"]) == 0
    card = ModelCard.load(best / "README.md")
    mean, sd = statistics.fmean(values.values()), statistics.stdev(values.values())
    assert f"| toy | Rouge-L | {mean:.2f} ± {sd:.2f} | 3 | 50 |" in card.text
    assert "99.0" not in card.text
    assert card.data.language == ["en"] and card.data.base_model == "openai/small"
    results = {result.metric_type: result for result in card.data.eval_results or []}
    assert results["rouge"].metric_value == pytest.approx(21.25)
    assert results["rouge"].metric_args["n"] == 3
    assert results["rouge"].metric_args["sd"] == pytest.approx(sd)
    assert results["rouge"].dataset_name == "toy"
    assert "--sets '[toy]' --eval.temperature 1.0 --max_prompt_length 256" in card.text
    # What was said stays; the scores are looked for again.
    assert main(["card", str(best)]) == 0
    assert ModelCard.load(best / "README.md").content == card.content


def test_ways_of_answering_are_not_mixed(best: Path) -> None:
    own, folder = checkpoint_fingerprint(str(best)), Path("greedy-and-sampled")
    write_result(folder, 10, 20.0, own)
    write_result(folder, 20, 30.0, own, temperature=0.5)
    assert main(["card", str(best), "--eval", str(folder)]) == 0
    text = (best / "README.md").read_text()
    assert "| toy | Rouge-L | 20.00 | 1 | 50 |" in text
    assert "| toy | Rouge-L | 30.00 | 1 | 50 |" in text


def test_a_part_of_a_set_never_replaces_the_whole(best: Path) -> None:
    """Seeds 10 and 20 of 50 records, and seed 10 again of the first five (``--limit 5``)."""
    own = checkpoint_fingerprint(str(best))
    for name in ("a-part", "z-part"):  # read before and after the whole
        write_result(Path("all", name), 10, 90.0, own, num=5, identity={"records": "five"})
    write_result(Path("all/whole"), 10, 20.0, own)
    write_result(Path("all/whole"), 20, 30.0, own)
    assert main(["card", str(best), "--eval", "all"]) == 0
    text = (best / "README.md").read_text()
    assert "| toy | Rouge-L | 25.00 ± 7.07 | 2 | 50 |" in text
    assert "90.0" not in text


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("dtype", ("auto", "float32")),
        ("attention", ("sdpa", "eager")),
        ("backend", ("transformers", "vllm")),
        ("sampler", (1, 2)),
    ],
)
def test_what_decides_answers_is_not_mixed(
    best: Path, name: str, values: tuple[object, object]
) -> None:
    own = checkpoint_fingerprint(str(best))
    for seed, (score, value) in enumerate(zip((20.0, 30.0), values, strict=True)):
        write_result(Path("all", str(seed)), seed, score, own, identity={name: value})
    assert main(["card", str(best), "--eval", "all"]) == 0
    text = (best / "README.md").read_text()
    assert "| toy | Rouge-L | 20.00 | 1 | 50 |" in text
    assert "| toy | Rouge-L | 30.00 | 1 | 50 |" in text
    assert all(f"{name} {json.dumps(value)}" in text for value in values)


def test_batch_limits_are_no_way_of_answering(best: Path) -> None:
    own = checkpoint_fingerprint(str(best))
    for seed, tokens in ((10, 4096), (20, None)):
        write_result(Path("all"), seed, 20.0, own, batch_size=seed, batch_tokens=tokens)
    assert main(["card", str(best), "--eval", "all"]) == 0
    assert "| toy | Rouge-L | 20.00 ± 0.00 | 2 | 50 |" in (best / "README.md").read_text()


def write_measured(root: Path, asked: EvaluateConfig, checkpoint: str) -> None:
    """Writes what evaluate.py leaves of a set of 12 prompts with the token metrics."""
    identity = {"weights and tokenizer": checkpoint, "records": "r", "dtype": asked.dtype}
    measured = {"nll": 1.3625, "kl_teacher_student": 0.25}
    for position, seed in enumerate(asked.eval.seeds):
        counts = {"num": 12, "truncated": position, "truncated_percent": 100 * position / 12}
        content = {
            "metrics": {"rougeL": 20.0 + position, "exact_match": 0.0, **counts, **measured},
            "measures": {"token_metrics": {"teacher": "t", "metrics": sorted(measured)}},
            **{"set": "toy", "seed": seed, "name": "toy", "identity": identity},
            "config": dataclasses.asdict(asked),
        }
        file = root / f"seed{seed}/toy/results.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(content))


def test_what_is_measured_once_has_no_spread_and_counts_are_no_scores(best: Path) -> None:
    asked = load_evaluate_config(["--eval.seeds", "[10, 20, 30]", "--token_metrics"])
    write_measured(Path("all"), asked, checkpoint_fingerprint(str(best)))
    assert main(["card", str(best), "--eval", "all"]) == 0
    card = ModelCard.load(best / "README.md")
    lines = [line.split(" | ") for line in card.text.splitlines() if line.startswith("| toy |")]
    assert [[line[1], line[2], line[3]] for line in lines] == [
        ["Rouge-L", "21.00 ± 1.00", "3"],
        ["Exact match (%)", "0.00 ± 0.00", "3"],
        ["Truncated answers (%)", "8.33 ± 8.33", "3"],  # of 12 answers 0, 1 and 2
        ["Loss on the references (nats per token)", "1.36", "1"],
        ["KL(teacher‖student) (nats per token)", "0.25", "1"],
    ]
    assert "| n | prompts |" in card.text
    results = {result.metric_type: result for result in card.data.eval_results or []}
    assert {*results} == {"rouge", "exact_match", "nll", "kl_teacher_student", "truncated_percent"}
    assert results["nll"].metric_args["n"] == 1 and "sd" not in results["nll"].metric_args


@pytest.mark.parametrize(
    "flags",
    [
        "--limit 12 --eval.seeds [7,8] --eval.long_prompts drop --eval.do_sample false",
        "--limit all --bad_lines skip --eval.seeds [10] --dtype float32 --data_dir own/data",
        "--token_metrics true --teacher 'own models/t' --teacher_lora own/adapter",
        "",
    ],
)
def test_the_cards_command_asks_for_what_made_its_scores(best: Path, flags: str) -> None:
    asked = load_evaluate_config(["--sets", "[toy]", *shlex.split(flags)])
    write_measured(Path("all"), asked, checkpoint_fingerprint(str(best)))
    for file in Path("all").rglob("results.json") if not asked.token_metrics else ():
        content = json.loads(file.read_text())
        file.write_text(json.dumps({**content, "measures": {}}))
    assert main(["card", str(best), "--eval", "all"]) == 0
    text = (best / "README.md").read_text()
    (command,) = [line for line in text.splitlines() if line.startswith("python evaluate.py")]
    again = load_evaluate_config(shlex.split(command)[2:])
    places = {"checkpoint": asked.checkpoint, "output_dir": asked.output_dir}
    assert dataclasses.asdict(again) | places == dataclasses.asdict(asked)
    assert f'long_prompts "{asked.eval.long_prompts}"' in text


def test_a_measure_of_a_later_command_is_asked_for_too(best: Path) -> None:
    """Its own file names the teacher, the cells' configuration does not."""
    asked = load_evaluate_config(["--sets", "[toy]", "--eval.seeds", "[10]"])
    write_measured(Path("all"), asked, checkpoint_fingerprint(str(best)))
    Path("all/token_metrics").mkdir()
    told = {"metrics": {}, "identity": {"teacher": "t"}, "teacher": "/home/alice/models/big"}
    Path("all/token_metrics/toy.json").write_text(json.dumps(told))
    assert main(["card", str(best), "--eval", "all"]) == 0
    assert "--teacher big --token_metrics true" in (best / "README.md").read_text()


def test_a_card_does_not_change_what_a_model_is(best: Path) -> None:
    before = checkpoint_fingerprint(str(best))
    assert main(["card", str(best), "--licence", "apache-2.0"]) == 0
    assert ModelCard.load(best / "README.md").data.license == "apache-2.0"
    assert checkpoint_fingerprint(str(best)) == before
    for name in ("README.md", FACTS_FILE):
        (best / name).unlink()
    assert checkpoint_fingerprint(str(best)) == before


def test_a_run_of_an_earlier_version_gets_a_card(run: RunFolder, best: Path) -> None:
    for name in ("README.md", FACTS_FILE):
        (best / name).unlink()
    run.status.write_text('{"state": "finished", "best_step": 20, "step": 40}')
    run.metrics.write_text('{"step": 20, "eval/dev/loss": 2.5, "perf/eval_s": 1}\n{"step": 4')
    assert main(["card", str(best)]) == 0
    text = (best / "README.md").read_text()
    assert "| optimizer steps | 20 of 40 |" in text and "| Loss (nats per token) | 2.5 |" in text
    assert "model was not trained on that template" in text


def test_what_cannot_get_a_card(
    run: RunFolder, best: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["card", "nowhere"]) == 2
    told = capsys.readouterr().err
    assert "model folder nowhere not found" in told and "fix: put" in told
    assert main(["card", str(run.root)]) == 2  # the likeliest mistake
    assert f"fix: give the path {best}" in capsys.readouterr().err
    best.rename(tmp_path / "moved")
    (tmp_path / "moved" / FACTS_FILE).write_text("{}")
    assert main(["card", "moved"]) == DataError.exit_code
    (tmp_path / "moved" / FACTS_FILE).unlink()
    assert main(["card", "moved"]) == 2
    assert "nothing tells how" in capsys.readouterr().err
    (tmp_path / "manifest.json").write_text("{}")  # as beside a saved state's student/
    assert main(["card", "moved"]) == 2
    assert "saved state" in capsys.readouterr().err


def test_parameters_are_counted_in_the_files(tmp_path: Path) -> None:
    assert count_parameters(tmp_path) is None
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, tmp_path / "1.safetensors")
    save_file({"c": torch.zeros(2, 2, 2)}, tmp_path / "2.safetensors")
    assert count_parameters(tmp_path) == 12 + 5 + 8
    whole = (tmp_path / "2.safetensors").read_bytes()
    (tmp_path / "2.safetensors").write_bytes(whole[:-4])
    assert count_parameters(tmp_path) is None
