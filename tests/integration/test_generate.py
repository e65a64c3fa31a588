"""The command: what it writes, keeps and refuses, and that training gets these answers only."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT, Workspace
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2LMHeadModel

import train
from distilllens.__main__ import main as command
from distilllens.commands import generate, generate_plan
from distilllens.config import load_config
from distilllens.data.prompts import alpaca_prompt
from distilllens.data.tokenize import PreparedData
from distilllens.errors import ConfigError, DataError
from distilllens.training.setup import load_data, plan_run

DEV = 12
TRAINING = 48
"""Records of the toy data after those of the dev set."""
LENGTH = 12


@pytest.fixture
def place(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """Shards of ten prompts; a teacher that ends some answers, also before their first token."""
    monkeypatch.setattr(generate_plan, "SHARD_PROMPTS", 10)
    model = GPT2LMHeadModel.from_pretrained(workspace.root / "teacher")
    with torch.no_grad():  # the head is the embedding: row 0, EOS, gets 3 × 0.7 more
        model.transformer.wte.weight[:, 0] = 0
        model.transformer.wte.weight[0, 0] = 0.7
        model.transformer.ln_f.bias[0] = 3
    model.save_pretrained(workspace.root / "teacher")
    return workspace


def flags(place: Workspace, *more: str, out: str = "run") -> list[str]:
    """Of a training on the answers, which are the command's too; ``more`` wins."""
    options = (
        *("--data.generated", f"{place.root}/answers", "--generate.max_new_tokens", str(LENGTH)),
        *("--model.teacher_dtype", "float32", "--data.max_prompt_length", "100"),
    )
    return place.flags(*options, *more, out=out)


def run_command(place: Workspace, *more: str) -> int:
    return command(["generate", *flags(place, *more)])


def raw(place: Workspace, folder: str = "answers") -> bytes:
    return (place.root / folder / "raw.jsonl").read_bytes()


def lines(place: Workspace, folder: str = "answers") -> list[dict[str, Any]]:
    return [json.loads(line) for line in raw(place, folder).splitlines()]


def receipt(place: Workspace) -> dict[str, Any]:
    return dict(json.loads((place.root / "answers/generation.json").read_text()))


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns inode and time of change of each file."""
    stats = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def gold(place: Workspace) -> list[dict[str, Any]]:
    text = (place.root / "data/toy/raw.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def load(place: Workspace, *more: str) -> PreparedData:
    return load_data(plan_run(load_config(flags(place, *more))))


# --- What is written ----------------------------------------------------------------------------


def test_training_prompts_are_answered_in_their_order(place: Workspace) -> None:
    assert run_command(place) == 0
    records, found = gold(place), lines(place)
    indices = [line["index"] for line in found]
    assert indices == sorted(set(indices)) and indices[0] >= DEV and len(indices) > TRAINING / 2
    for line in found:
        record = records[line["index"]]
        assert (line["instruction"], line["input"]) == (record["instruction"], record["input"])
        assert line["prompt"] == alpaca_prompt(record["instruction"], record["input"])
        assert line["output"].strip() and line["output"] != record["output"]


def test_a_greedy_answer_is_the_teachers_likeliest_text(place: Workspace) -> None:
    model = GPT2LMHeadModel.from_pretrained(place.root / "teacher").eval()
    tokenizer = AutoTokenizer.from_pretrained(place.root / "teacher")
    with torch.no_grad():  # else it would say EOS, or the prompt's last token over and over
        model.transformer.ln_f.bias[0] = 0.3
        model.transformer.wte.weight[tokenizer("Response:\n")["input_ids"][-1]] = 0
    model.save_pretrained(place.root / "teacher")
    assert run_command(place, "--generate.do_sample", "false") == 0
    found = lines(place)
    assert len(found) > 4
    for line in found[:5]:
        ids = tokenizer(line["prompt"])["input_ids"]
        start = len(ids)
        while len(ids) < start + LENGTH:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        expected = str(tokenizer.decode(ids[start:], skip_special_tokens=True))
        assert line["output"] == expected.replace("\0", "\ufffd")
        assert line["truncated"] == (ids[-1] != tokenizer.eos_token_id)


def test_counts_add_up_and_are_told(place: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(place) == 0
    told = " ".join(capsys.readouterr().out.split())
    found, content = lines(place), receipt(place)
    counts = content["counts"]
    assert counts["answers"] == counts["prompts"] == counts["training_records"] == TRAINING
    assert counts["empty"] > 0 and counts["written"] == len(found) == TRAINING - counts["empty"]
    assert 0 < counts["truncated"] == sum(line["truncated"] for line in found) < len(found)
    assert 1 < content["mean_tokens"] < LENGTH
    assert content["config"]["generate"]["seed"] == 10 and content["devices"] == ["cpu"]
    assert {"versions", "git_commit", "teacher"} <= content.keys()
    assert "48 of 48 training prompts (0 over 100 tokens dropped) × 1 answers in 5 shards" in told
    assert f"{counts['empty']} empty ones left out, {counts['truncated']} ended by length" in told


@pytest.mark.long
def test_neither_batches_nor_processes_change_the_answers(place: Workspace) -> None:
    assert run_command(place, "--generate.batch_size", "7") == 0
    shutil.move(place.root / "answers", place.root / "first")
    assert run_command(place, "--generate.batch_size", "1") == 0
    assert raw(place) == raw(place, "first")
    shutil.rmtree(place.root / "answers")
    worker = place.root / "worker.py"
    worker.write_text(
        "import os, sys\nfrom distilllens.commands import generate, generate_plan\n"
        "generate_plan.SHARD_PROMPTS = 10\n"
        "write = generate.write_part\n"
        "def tell_and_write(folder, shard, content):\n"
        "    print(f'\\nprocess {os.environ[\"RANK\"]} wrote {shard.number}\\n', flush=True)\n"
        "    write(folder, shard, content)\n"
        "generate.write_part = tell_and_write\n"
        "from distilllens.__main__ import main\nsys.exit(main(['generate', *sys.argv[1:]]))\n"
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", "2", str(worker), *flags(place)),
        ],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    wrote = [line.split() for line in done.stdout.splitlines() if " wrote " in line]
    assert sorted((int(n), int(rank)) for _, rank, _, n in wrote) == [(n, n % 2) for n in range(5)]
    assert done.stdout.count("ended by length") == 1  # one of them speaks
    assert raw(place) == raw(place, "first")


def test_more_samples_come_beside_the_first(place: Workspace) -> None:
    assert run_command(place) == 0
    shutil.move(place.root / "answers", place.root / "first")
    assert run_command(place, "--generate.samples", "3") == 0
    found = lines(place)
    assert [line for line in found if line["sample"] == 0] == lines(place, "first")
    places = [(line["index"], line["sample"]) for line in found]
    assert places == sorted(places) and len(places) > 2.2 * TRAINING
    texts: dict[int, set[str]] = {}
    for line in found:
        texts.setdefault(line["index"], set()).add(line["output"])
    assert sum(len(several) > 1 for several in texts.values()) > 0.9 * TRAINING
    assert len(load(place, "--generate.samples", "3").train) == len(found)


def test_overlong_prompts_are_dropped_and_told(
    place: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(place.root / "teacher")
    lengths = [len(tokenizer(alpaca_prompt(r["instruction"]))["input_ids"]) for r in gold(place)]
    limit = sorted(lengths)[len(lengths) // 2]
    fitting = [i for i, length in enumerate(lengths) if length <= limit and i >= DEV]
    assert run_command(place, "--data.max_prompt_length", str(limit)) == 0
    assert {line["index"] for line in lines(place)} <= set(fitting)
    dropped = TRAINING - len(fitting)
    assert receipt(place)["counts"]["overlong_prompts"] == dropped > 0
    assert f"({dropped} over {limit} tokens dropped)" in " ".join(capsys.readouterr().out.split())


# --- Going on -----------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_to_the_same_file(
    place: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = generate.write_part

    def write_and_stop(folder: Path, shard: generate.Shard, content: dict[str, Any]) -> None:
        write(folder, shard, content)
        if shard.number == 1:
            signal.raise_signal(signal.SIGTERM)

    folder = place.root / "answers"
    with monkeypatch.context() as patch:
        patch.setattr(generate, "write_part", write_and_stop)
        assert run_command(place) == 143
    told = capsys.readouterr().err
    assert "SIGTERM: stopped while answering; finished shards are kept" in told
    assert "resume with: python -m distilllens generate --model.student" in told
    kept = files(folder)
    assert kept.keys() == {"parts", "parts/00000.json", "parts/00001.json"}
    (folder / "parts/00003.json").write_text('{"key": ')  # as no kill of ours leaves it
    (folder / ".raw.jsonl.tmp").write_text("half a file")
    with pytest.raises(DataError, match="is not finished"):
        load(place)
    assert run_command(place) == 0
    assert "2 there already" in " ".join(capsys.readouterr().out.split())
    after = files(folder)
    assert all(after[f"parts/0000{n}.json"] == kept[f"parts/0000{n}.json"] for n in (0, 1))
    assert not (folder / ".raw.jsonl.tmp").exists()
    resumed = raw(place)
    shutil.rmtree(folder)
    assert run_command(place) == 0
    assert raw(place) == resumed


def test_what_is_finished_is_left_alone(
    place: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(place) == 0
    before = files(place.root / "answers")
    monkeypatch.setattr(generate, "load_teacher", None)
    assert run_command(place, "--generate.batch_size", "3", "--optim.lr", "0.5") == 0
    assert "all is there already" in " ".join(capsys.readouterr().out.split())
    assert files(place.root / "answers") == before
    shutil.rmtree(place.root / "answers/parts")  # they have served
    assert run_command(place) == 0
    assert "all is there already" in " ".join(capsys.readouterr().out.split())


def test_limit_and_choice_cost_only_the_rest(
    place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_command(place, "--generate.limit", "25") == 0
    few = lines(place)
    assert {line["index"] for line in few} <= set(range(DEV, DEV + 25)) and len(few) > 12
    assert run_command(place) == 0
    every = lines(place)
    assert every[: len(few)] == few and len(every) > len(few)
    with monkeypatch.context() as patch:
        patch.setattr(generate, "load_teacher", None)
        assert run_command(place, "--generate.keep_truncated", "false") == 0
        assert lines(place) == [line for line in every if not line["truncated"]]
        assert run_command(place, "--generate.limit", "25") == 0  # of a longer part
    assert lines(place) == few


# --- What is refused ----------------------------------------------------------------------------


def other_teacher(place: Workspace) -> None:
    path = place.root / "teacher/model.safetensors"
    weights = load_file(path)
    weights["transformer.ln_f.bias"][3] += 0.5
    save_file(weights, path, {"format": "pt"})


def other_record(place: Workspace) -> None:
    path = place.root / "data/toy/raw.jsonl"
    path.write_text(path.read_text().replace("cat", "cow"))


OTHERS: dict[str, tuple[Callable[[Workspace], None] | None, tuple[str, ...]]] = {
    "dev_size": (None, ("--eval.dev_size", "11")),
    "generate.temperature": (None, ("--generate.temperature", "0.9")),
    "generate.seed": (None, ("--generate.seed", "11")),
    "teacher_dtype": (None, ("--model.teacher_dtype", "bfloat16")),
    "teacher": (other_teacher, ()),
    "data": (other_record, ("--model.teacher", "ROOT/other")),
}


def test_answers_of_something_else_are_refused_by_name(
    place: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether or not they are finished; all of them are kept."""
    assert run_command(place) == 0
    folder, copy = place.root / "answers", place.root / "other"
    shutil.copytree(place.root / "teacher", copy)
    for part, (change, more) in OTHERS.items():
        if change is not None:
            change(place)
        before = files(folder)
        assert run_command(place, *(flag.replace("ROOT", str(place.root)) for flag in more)) == 2
        told = capsys.readouterr().err
        assert f"was made with {part} " in told and told.count(", this run has ") == 1
        assert files(folder) == before
    (folder / "generation.json").unlink()
    assert run_command(place, "--model.teacher", str(copy)) == 2
    assert "was made with data " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "code", "told"),
    [
        (("--data.generated", "null"), 2, "generate needs --data.generated"),
        (("--data.generated", "ROOT/data/toy"), 2, "holds other things than generated answers"),
        (("--data.generated", "ROOT/mine"), 2, "for example raw.jsonl"),
        (("--data.generated", "ROOT/student/config.json"), 2, "it is a file"),
        (("--model.teacher", "ROOT/gone"), 2, "ROOT/gone not found"),
        (("--generate.max_new_tokens", "100"), 2, "--generate.max_new_tokens"),
        (("--generate.temperature", "0"), 2, "generate.temperature=0.0 must be > 0"),
        (("--generate.samples", "2", "--generate.do_sample", "false"), 2, "be the same: greedy"),
        (("--eval.dev_size", "60"), 3, "no prompt to answer"),
        (("--data.max_prompt_length", "5"), 3, "no prompt to answer"),
        (("--data.path", "ROOT/gone"), 3, "no such file"),
    ],
)
def test_wrong_options(
    more: tuple[str, ...],
    code: int,
    told: str,
    place: Workspace,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = str(place.root)
    (place.root / "mine").mkdir()  # a data set is never taken for answers to write over
    shutil.copy(place.root / "data/toy/raw.jsonl", place.root / "mine/raw.jsonl")
    before = files(place.root)
    assert run_command(place, *(flag.replace("ROOT", root) for flag in more)) == code
    assert told.replace("ROOT", root) in capsys.readouterr().err
    assert files(place.root) == before


def test_answers_that_all_are_empty_make_no_data(
    place: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    only = ("--generate.max_new_tokens", "1", "--generate.keep_truncated", "false")
    assert run_command(place, *only) == 3
    assert "none of 48 answers is fit to train on" in capsys.readouterr().err
    assert not (place.root / "answers/raw.jsonl").exists()


def test_a_full_disk_keeps_what_is_finished(
    place: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json = generate.write_json

    def write_until_full(path: Path, content: Any) -> None:
        if path.name == "00002.json":
            raise OSError(28, "No space left on device")
        write_json(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "write_json", write_until_full)
        assert run_command(place) == 6
    told = capsys.readouterr().err
    assert "00002.json" in told and "No space left" in told and "kept: finished shards" in told
    assert run_command(place) == 0
    assert "2 there already" in " ".join(capsys.readouterr().out.split())


def test_a_dry_run_writes_nothing(place: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(place, "--dry_run") == 0
    assert "in 5 shards, 0 there already" in " ".join(capsys.readouterr().out.split())
    assert not (place.root / "answers").exists()


# --- What training gets -------------------------------------------------------------------------


def losses(place: Workspace, out: str) -> list[float]:
    text = (place.root / out / "metrics.jsonl").read_text()
    return [m["train/loss"] for m in map(json.loads, text.splitlines()) if "train/loss" in m]


SEQKD = ("--objective.approach", "seqkd")


def test_seqkd_trains_on_the_answers(place: Workspace) -> None:
    """Its loss is that of fine-tuning on the same records written by hand; no teacher is there."""
    assert run_command(place, "--generate.keep_truncated", "false") == 0
    head = gold(place)[:DEV]
    answers = [
        {key: line[key] for key in ("instruction", "input", "output")} for line in lines(place)
    ]
    (place.root / "hand").mkdir()
    text = "".join(f"{json.dumps(record)}\n" for record in [*head, *answers])
    (place.root / "hand/raw.jsonl").write_text(text)
    shutil.rmtree(place.root / "teacher")
    assert train.main(flags(place, *SEQKD)) == 0
    sft = ("--objective.approach", "sft", "--data.generated", "null")
    by_hand = (*sft, "--data.path", f"{place.root}/hand")
    assert train.main(flags(place, *by_hand, out="hand_run")) == 0
    assert train.main(flags(place, *sft, out="gold_run")) == 0
    assert len(losses(place, "run")) == 4
    assert losses(place, "run") == losses(place, "hand_run")
    assert all(a != b for a, b in zip(losses(place, "run"), losses(place, "gold_run"), strict=True))
    told = (place.root / "run/log.txt").read_text()
    assert f"{len(answers)} answers are {place.root}/teacher's" in " ".join(told.split())


def test_dev_records_stay_the_files_own_and_out_of_training(place: Workspace) -> None:
    assert run_command(place) == 0
    plain, taught = load(place, "--data.generated", "null"), load(place)
    assert taught.dev["reference"] == plain.dev["reference"]
    assert taught.dev["response_ids"] == plain.dev["response_ids"]
    assert plain.fingerprint != taught.fingerprint
    prompts = [tuple(ids) for ids in plain.train["prompt_ids"]]
    order = iter(prompts)
    assert all(tuple(ids) in order for ids in taught.train["prompt_ids"])  # theirs, in their order


def test_keep_gold_trains_on_both(place: Workspace) -> None:
    assert run_command(place) == 0
    plain, taught = load(place, "--data.generated", "null"), load(place)
    both = load(place, "--data.keep_gold", "true")
    assert len(both.train) == len(plain.train) + len(taught.train)
    assert len({data.fingerprint for data in (plain, taught, both)}) == 3

    def rows(data: PreparedData) -> list[tuple[tuple[int, ...], ...]]:
        columns = (data.train["prompt_ids"], data.train["response_ids"])
        return [tuple(map(tuple, row)) for row in zip(*columns, strict=True)]

    assert sorted(rows(both)) == sorted(rows(plain) + rows(taught))
    assert load(place, "--data.generated", "null").fingerprint == plain.fingerprint
    few = load(place, "--data.keep_gold", "true", "--data.train_size", "20")
    assert len(set(rows(few)) & set(rows(plain))) in range(9, 15)  # the first of both kinds


def test_truncated_answers_do_not_end(place: Workspace) -> None:
    assert run_command(place) == 0
    ends = [ids[-1] == 0 for ids in load(place).train["response_ids"]]
    assert ends == [not line["truncated"] for line in lines(place)]
    assert 0 < sum(ends) < len(ends)


def test_divergences_train_on_the_teachers_text_too(place: Workspace) -> None:
    assert run_command(place) == 0
    kd = ("--objective.approach", "kd", "--objective.kd_ratio", "0.5", "--optim.max_steps", "2")
    assert train.main(flags(place, *kd)) == 0
    assert len(losses(place, "run")) == 1


def test_prepare_tokenises_the_answers(
    place: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.root)
    assert run_command(place) == 0
    options = ["--model", "student", "--data", "data/toy", "--dev_size", str(DEV)]
    assert command(["prepare", *options, "--generated", "answers"]) == 0
    assert command(["prepare", *options, "--generated", "answers", "--keep_gold", "true"]) == 0
    names = {path.name for path in (place.root / "processed_data/toy").iterdir()}
    assert names == {"generated-answers", "generated-answers-and-gold"}
    capsys.readouterr()
    assert command(["prepare", *options, "--keep_gold", "true"]) == 2
    assert "--keep_gold needs --generated" in capsys.readouterr().err


def edited(place: Workspace) -> None:
    path = place.root / "answers/raw.jsonl"
    path.write_bytes(path.read_bytes().replace(b"Sort", b"sort", 1))


def unfinished(place: Workspace) -> None:
    (place.root / "answers/generation.json").unlink()


def damaged(place: Workspace) -> None:
    (place.root / "answers/generation.json").write_text('{"key": []}')


def test_training_refuses_answers_to_other_records(place: Workspace) -> None:
    """Also where the same answers were tokenised before."""
    assert run_command(place) == 0
    load(place)
    with pytest.raises(DataError, match="made with dev_size 12, this run has 13") as caught:
        load(place, "--eval.dev_size", "13")
    assert "python -m distilllens generate" in caught.value.fix
    with pytest.raises(DataError, match="gone is not there"):
        load(place, "--data.generated", f"{place.root}/gone")
    for change, told in (
        (edited, "raw.jsonl is not as it was made"),
        (other_record, "answers was made with data "),
        (damaged, "generation.json cannot be read"),
        (unfinished, "answers is not finished"),
    ):
        change(place)
        with pytest.raises(DataError, match=told):
            load(place)


def test_seqkd_names_the_command_that_it_needs(place: Workspace) -> None:
    with pytest.raises(ConfigError, match=r"seqkd needs data\.generated") as caught:
        load_config(flags(place, *SEQKD, "--data.generated", "null"))
    assert "python -m distilllens generate" in caught.value.fix
    with pytest.raises(ConfigError, match=r"keep_gold needs data\.generated"):
        load_config(flags(place, "--data.generated", "null", "--data.keep_gold", "true"))
