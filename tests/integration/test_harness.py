"""`evaluate --harness`: own tasks on tiny models, against log-likelihoods computed by hand."""

from __future__ import annotations

import importlib.util
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import Size, build
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

import evaluate

QUESTIONS = [
    ("Sort the words: pear, apple.", ["apple, pear", "pear"], 0),
    ("The quick brown", ["fox", "words", "task"], 2),
    ("Below is an instruction", ["that describes", "paired", "the"], 2),
    ("Write a response", ["that", "apple", "### Input:"], 0),
    ("The answer is", ["fig", "request"], 1),
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/test.jsonl}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
metadata: {{version: 2.5}}
"""


WRITING = """
task: own_writing
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/writing.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["never said"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def place(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A working folder with a model in model/ and the task own_words in tasks/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    build("llama", Size(vocab=300, positions=128)).save_pretrained("model")
    tiny_tokenizer.save_pretrained("model")
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = [
        json.dumps({"question": question, "choices": choices, "answer": answer})
        for question, choices, answer in QUESTIONS
    ]
    (folder / "test.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "words.yaml").write_text(TASK.format(name="own_words", folder=folder))
    return tmp_path


def run(*arguments: str, tasks: str = "own_words") -> int:
    options = ["--checkpoint", "model", "--output_dir", "out", "--eval.batch_size", "2"]
    return evaluate.main([*options, "--harness", tasks, "--harness_path", "tasks", *arguments])


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path("out/harness", name, "results.json").read_text())
    return content


def log_likelihood(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, text: str
) -> float:
    """Sum of the log-probabilities of the tokens that ``text`` adds to ``prompt``, one by one."""
    context, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + text)["input_ids"]
    total = 0.0
    for position in range(len(context), len(whole)):
        with torch.no_grad():
            logits = model(torch.tensor([whole[:position]])).logits[0, -1].double()
        total += float(logits[whole[position]] - logits.logsumexp(0))
    return total


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_accuracy_is_that_of_log_likelihoods_by_hand(
    family: str, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model = build(family, Size(vocab=300, positions=128))
    model.save_pretrained("model")
    right = []
    for question, choices, answer in QUESTIONS:
        values = [log_likelihood(model, tiny_tokenizer, question, f" {c}") for c in choices]
        right.append(values.index(max(values)) == answer)
    assert 0 < sum(right) < len(right), "choose questions that tell right from wrong"
    assert run() == 0
    result = read("own_words")
    assert result["metrics"]["acc,none"] == sum(right) / len(right)
    lines = Path("out/harness/own_words/samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["acc"] for line in lines] == [float(value) for value in right]
    assert result["harness"]["versions"] == {"own_words": 2.5}
    assert result["harness"]["n-samples"]["own_words"]["effective"] == 5
    assert result["seeds"]["fewshot_random_seed"] == 1234
    assert {"lm_eval", "torch", "transformers"} <= set(result["versions"])


def test_a_task_alone_says_how_texts_are_generated(
    place: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Six greedy tokens by hand, against a checkpoint that forbids them and ends after two."""
    model = build("llama", Size(vocab=300, positions=128))
    lines, said = [], set()
    for question, _, _ in QUESTIONS:
        ids = tiny_tokenizer(question)["input_ids"]
        for _ in range(6):
            with torch.no_grad():
                ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        answer = tiny_tokenizer.decode(ids[-6:])
        said |= set(ids[-6:])
        lines.append(json.dumps({"question": question, "answer": answer}))
    assert tiny_tokenizer.eos_token_id not in said
    model.generation_config = GenerationConfig(max_new_tokens=2, suppress_tokens=sorted(said))
    model.save_pretrained("model")
    (place / "tasks/writing.jsonl").write_text("\n".join(lines) + "\n")
    (place / "tasks/writing.yaml").write_text(WRITING.format(folder=place / "tasks"))
    assert run(tasks="own_writing") == 0
    assert read("own_writing")["metrics"]["exact_match,none"] == 1.0


@pytest.mark.usefixtures("place")
def test_figures_of_earlier_rules_are_not_taken_for_these(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("--limit", "1") == 0
    file = Path("out/harness/own_words/results.json")
    content = read("own_words")
    del content["identity"]["rules"]  # as before there were any
    file.write_text(json.dumps(content))
    assert run("--limit", "1") == 2
    assert "rules: None there" in capsys.readouterr().err


@pytest.mark.usefixtures("place")
def test_finished_tasks_are_skipped_and_others_refused(
    capsys: pytest.CaptureFixture[str], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert run("--limit", "3") == 0
    printed = capsys.readouterr().out
    assert "own_words" in printed
    assert "acc" in printed
    assert read("own_words")["harness"]["n-samples"]["own_words"] == {"original": 5, "effective": 3}
    file = Path("out/harness/own_words/results.json")
    before = file.stat().st_mtime_ns
    assert run("--limit", "3", "--eval.batch_size", "1") == 0
    assert "1 tasks, 1 finished already" in capsys.readouterr().out
    assert file.stat().st_mtime_ns == before

    assert run("--limit", "4") == 2
    assert "limit: 3 there, 4 now" in capsys.readouterr().err
    assert run("--limit", "3", "--harness_fewshot", "1") == 2
    assert "harness_fewshot: None there, 1 now" in capsys.readouterr().err
    with Path("tasks/test.jsonl").open("a") as stream:
        stream.write(json.dumps({"question": "x", "choices": ["y", "z"], "answer": 1}) + "\n")
    assert run("--limit", "3") == 2
    assert "own tasks: " in capsys.readouterr().err
    assert run("--limit", "3", "--overwrite", "--harness_fewshot", "1") == 0
    assert read("own_words")["harness"]["n-shot"] == {"own_words": 1}


@pytest.mark.slow  # a group needs lm-eval's own index of tasks
@pytest.mark.usefixtures("place")
def test_a_group_has_its_own_figure() -> None:
    folder = Path("tasks").resolve()
    (folder / "more.yaml").write_text(TASK.format(name="own_more", folder=folder))
    (folder / "both.yaml").write_text(
        "group: own_both\ntask: [own_words, own_more]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    assert run("--dry_run", tasks="[own_words, own_more]") == 0
    assert not Path("out").exists()
    assert run(tasks="own_words,own_both") == 0
    single, both = read("own_words"), read("own_both")
    assert both["metrics"]["acc,none"] == single["metrics"]["acc,none"]
    assert set(both["harness"]["results"]) >= {"own_words", "own_more"}


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("tasks", "arguments", "code", "message"),
    [
        pytest.param("arc_esy", [], 2, "did you mean arc_easy", marks=pytest.mark.slow),
        ("own_words,own_words", [], 2, "each once"),
        ("../own", [], 2, "must name tasks"),
        ("own_words", ["--harness_path", "nowhere"], 2, "harness_path=nowhere: no such folder"),
        ("own_words", ["--harness_fewshot", "-1"], 2, "harness_fewshot=-1 must be ≥ 0"),
        ("own_words", ["--limit", "0"], 2, "limit=0"),
        ("own_words", ["--checkpoint", "none/there"], 2, "none/there"),
        ("own_lost", [], 3, "the task own_lost cannot be loaded"),
        ("own_unsafe", [], 2, "runs code that the model writes"),
    ],
)
def test_errors_for_users(
    capsys: pytest.CaptureFixture[str], tasks: str, arguments: list[str], code: int, message: str
) -> None:
    lost = TASK.format(name="own_lost", folder="nowhere")
    Path("tasks/lost.yaml").write_text(lost)
    unsafe = TASK.format(name="own_unsafe", folder=Path("tasks").resolve())
    Path("tasks/unsafe.yaml").write_text(f"{unsafe}unsafe_code: true\n")
    assert run(*arguments, tasks=tasks) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.usefixtures("place")
def test_several_processes_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run() == 2
    assert "one process" in capsys.readouterr().err


@pytest.mark.usefixtures("place")
def test_a_missing_package_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name)
    )
    assert run() == 2
    assert "bash scripts/setup.sh harness" in capsys.readouterr().err
