"""Bad input of every kind: the right exit code, a message that names it, no traceback, no mess."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import PROJECT, write_records
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from inputs import (
    BROKEN_LINES,
    CASES,
    CONFIG,
    GOOD,
    HOSTILE_SIZES,
    WRITING_CASES,
    BadInput,
    change,
)
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

import evaluate
import train
from distilllens.__main__ import main as command_main

LEAST_CASES = 200
CODES = {0, 2, 3, 4, 6}
"""What an input may end with: done, or one of the codes that are the user's to mend."""
Run = Callable[[BadInput], "Outcome"]
Capture = pytest.CaptureFixture[str]


@dataclass(frozen=True)
class Outcome:
    """What a command said and wrote."""

    code: int
    output: str
    errors: str
    changed: set[str]
    """Paths below the workspace that are new, gone or different."""
    root: Path

    @property
    def folders(self) -> set[str]:
        """The first parts of these paths."""
        return {path.partition("/")[0] for path in self.changed}

    def says(self, told: str) -> bool:
        """Whether the message matches a pattern, in which ROOT is the workspace."""
        pattern = told.replace("ROOT", re.escape(str(self.root)))
        return re.search(pattern, self.errors) is not None


@pytest.fixture(scope="module")
def original(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_gpt2: Callable[..., GPT2LMHeadModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A teacher of 6 blocks, a student of 3, 60 records and 10 for tests: copied for each case."""
    root = tmp_path_factory.mktemp("original")
    for name, blocks in (("teacher", 6), ("student", 3)):
        tiny_gpt2(n_layer=blocks, n_embd=16, n_head=2).save_pretrained(root / name)
        tiny_tokenizer.save_pretrained(root / name)
    write_records(root / "data/toy/raw.jsonl", 60)
    write_records(root / "data/toy/valid.jsonl", 10, seed=1)
    return root


def arguments(case: BadInput, root: Path, *, dry_run: bool) -> list[str]:
    """Returns a command line that is right but for what the case adds."""
    common = {
        "train": [
            *("--model.student", "ROOT/student", "--model.teacher", "ROOT/teacher"),
            *("--data.path", "ROOT/data/toy", "--data.processed", "ROOT/tokens"),
            *("--eval.dev_size", "12", "--optim.micro_batch_size", "8", "--optim.max_steps", "2"),
            *("--data.max_length", "200", "--data.max_prompt_length", "150"),
            *("--objective.lens.count", "2", "--run.output_dir", "ROOT/run"),
            *("--deepspeed", str(PROJECT / "configs/deepspeed/zero1_fp32.json")),
            *(("--dry_run",) if dry_run else ()),
        ],
        "evaluate": [
            *("--checkpoint", "ROOT/student", "--data_dir", "ROOT/data", "--sets", "[toy]"),
            *("--output_dir", "ROOT/results", "--eval.seeds", "[1]", "--eval.max_new_tokens", "4"),
        ],
        "prepare": [
            *("--model", "ROOT/student", "--data", "ROOT/data/toy", "--processed", "ROOT/tokens"),
            *("--dev_size", "12", "--max_length", "200", "--max_prompt_length", "150"),
        ],
    }
    return [flag.replace("ROOT", str(root)) for flag in (*common[case.command], *case.flags)]


def call(case: BadInput, flags: list[str]) -> int:
    """Runs the command in this process and returns its exit code."""
    if case.command == "train":
        return train.main(flags)
    if case.command == "evaluate":
        return evaluate.main(flags)
    return command_main(["prepare", *flags])


def snapshot(root: Path) -> dict[str, str]:
    """Returns a mark of every file, folder, pipe and link below a folder."""
    marks = {}
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            path = Path(folder) / name
            if path.is_symlink():
                mark = f"→ {os.readlink(path)}"
            else:
                mark = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "other"
            marks[str(path.relative_to(root))] = mark
    return marks


@pytest.fixture
def run(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> Callable[..., Outcome]:
    """Runs one case in a copy of the workspace, from an empty folder."""

    def run_case(case: BadInput, *, dry_run: bool = True) -> Outcome:
        root, here = tmp_path / "workspace", tmp_path / "here"
        for folder in (root, here):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, root)
        here.mkdir()
        monkeypatch.chdir(here)
        case.edit(root)
        before = snapshot(root)
        capsys.readouterr()
        code = call(case, arguments(case, root, dry_run=dry_run))
        output, errors = capsys.readouterr()
        after = snapshot(root)
        assert not list(here.iterdir()), "something was written where the command was called"
        changed = {p for p in before.keys() | after.keys() if before.get(p) != after.get(p)}
        return Outcome(code, output, errors, changed, root)

    return run_case


def check_manners(outcome: Outcome) -> None:
    """Up to four short lines, no traceback, nothing that a terminal would obey."""
    screen = outcome.output + outcome.errors
    assert "Traceback" not in screen
    assert "\x1b" not in screen and "\0" not in screen
    lines = outcome.errors.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("error[DL-"))
    message = lines[start:]
    assert 1 <= len(message) <= 4
    assert all(re.match(r"  (why|fix|kept): \S", line) for line in message[1:])
    assert max(map(len, message)) < 1000


# --- By hand ------------------------------------------------------------------------------------


def test_there_are_enough() -> None:
    assert len(CASES) >= LEAST_CASES
    assert {case.command for case in CASES.values()} == {"train", "evaluate", "prepare"}
    assert {case.code for case in (CASES | WRITING_CASES).values()} == {2, 3, 4, 6}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_and_leaves_no_trace(name: str, run: Run) -> None:
    case = CASES[name]
    outcome = run(case)
    assert outcome.code == case.code, outcome.errors
    assert outcome.says(case.told), outcome.errors
    check_manners(outcome)
    # What fits the tokens is known before what does not fit the batch or the weights.
    assert outcome.folders <= ({"tokens"} if "fewer than a batch" in name else {"results"})


@pytest.mark.parametrize("name", WRITING_CASES)
def test_a_real_run_writes_into_its_own_folder_only(name: str, run: Callable[..., Outcome]) -> None:
    case = WRITING_CASES[name]
    outcome = run(case, dry_run=False)
    assert outcome.code == case.code, outcome.errors
    assert outcome.says(case.told), outcome.errors
    check_manners(outcome)
    assert outcome.folders <= {"run", "tokens"}


def test_the_workspace_itself_is_right(run: Run) -> None:
    """Else every case would be refused for what they have in common."""
    for command in ("train", "evaluate", "prepare"):
        case = BadInput(command=command, code=0, told="")
        outcome = run(case)
        assert outcome.code == 0, outcome.errors
        assert outcome.folders <= {"tokens", "results"}


@pytest.mark.parametrize("name", ["s[/bold]", "s[bold]", "%s {0}"])
def test_brackets_in_names_are_no_markup(run: Run, name: str) -> None:
    def edit(root: Path) -> None:
        (root / name).parent.mkdir(exist_ok=True)
        (root / "student").rename(root / name)

    outcome = run(BadInput(code=0, told="", flags=("--model.student", f"ROOT/{name}"), edit=edit))
    assert outcome.code == 0, outcome.errors
    assert name in outcome.output.replace("\n", "")


# --- What is accepted or skipped ----------------------------------------------------------------


def test_broken_lines_are_skipped_and_counted(run: Run) -> None:
    lines = [GOOD] * 30 + [line for line, _ in BROKEN_LINES.values()]

    def edit(root: Path) -> None:
        (root / "data/toy/raw.jsonl").write_bytes(b"\n".join(lines))

    dry = run(BadInput(code=0, told="", flags=("--data.bad_lines", "skip"), edit=edit))
    assert dry.code == 0, dry.errors
    assert not dry.changed
    assert f"{len(BROKEN_LINES)} broken lines skipped" in " ".join(dry.output.split())
    flags = ("--bad_lines", "skip")
    outcome = run(BadInput(code=0, told="", command="prepare", flags=flags, edit=edit))
    assert outcome.code == 0, outcome.errors
    kept = (outcome.root / "tokens/broken_lines.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["line"] for line in kept] == list(range(31, 31 + len(BROKEN_LINES)))
    manifest = json.loads((outcome.root / "tokens/manifest.json").read_text(encoding="utf-8"))
    assert manifest["stats"]["skipped_lines"] == len(BROKEN_LINES)


@pytest.mark.parametrize("written", ["1:30:00", "01:30:00", "'1:30:00'", '"1:30:00"'])
def test_an_unquoted_wall_time_is_understood(run: Run, written: str) -> None:
    """YAML 1.1 reads 1:30:00 as the number 5400."""

    def edit(root: Path) -> None:
        (root / "layer.yaml").write_text(f"run: {{max_wall_time: {written}}}", encoding="utf-8")

    flags = ("--config", "ROOT/layer.yaml")
    assert run(BadInput(code=0, told="", flags=flags, edit=edit)).code == 0


def test_padding_of_a_vocabulary_is_no_bad_input(run: Run) -> None:
    outcome = run(BadInput(code=0, told="", edit=change("teacher/config.json", vocab_size=320)))
    assert outcome.code == 0, outcome.errors
    assert "teacher vocabulary 320 cut to 300 (padding, no tokens)" in outcome.output


# --- Harm ---------------------------------------------------------------------------------------


def test_hostile_sizes_do_not_fill_the_memory(run: Run) -> None:
    """Each of them took gigabytes, or would have, before anything was read but config.json."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for edit in HOSTILE_SIZES.values():
        assert run(BadInput(code=2, told="", edit=edit)).code == 2
    assert run(CASES["weights: terabytes"]).code == 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


@pytest.mark.parametrize("family", ["gpt2", "made-up"])
@pytest.mark.parametrize("command", ["train", "evaluate", "prepare"])
def test_code_of_a_model_folder_does_not_run(run: Run, family: str, command: str) -> None:
    """A family that the library knows is loaded without that code, any other is refused."""
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}

    def edit(root: Path) -> None:
        canary = root / "canary"
        code = f"open({str(canary)!r}, 'w').close()\n"
        (root / "student/own.py").write_text(code, encoding="utf-8")
        change(CONFIG, model_type=family, auto_map=names)(root)
        change("student/tokenizer_config.json", auto_map={"AutoTokenizer": ["own.T", None]})(root)

    code = 0 if family == "gpt2" else 2
    outcome = run(BadInput(command=command, code=code, told="", edit=edit))  # type: ignore[arg-type]
    assert outcome.code == code, outcome.errors
    assert "canary" not in outcome.changed
    if family == "gpt2":
        for name in ("config", "tokenizer_config"):
            told = f"student/{name}.json: auto_map is ignored and its code does not run"
            assert outcome.errors.count(told) == 1, outcome.errors
    else:
        assert outcome.says("asks to run Python code"), outcome.errors
        assert not outcome.changed


def test_pickled_weights_do_not_run(run: Run) -> None:
    class Canary:
        def __init__(self, path: Path) -> None:
            self.path = path

        def __reduce__(self) -> tuple[object, tuple[str, str]]:
            return open, (str(self.path), "w")

    def edit(root: Path) -> None:
        (root / "student/model.safetensors").unlink()
        content = pickle.dumps({"w": Canary(root / "canary")})
        (root / "student/pytorch_model.bin").write_bytes(content)

    outcome = run(BadInput(command="evaluate", code=2, told="", edit=edit))
    assert outcome.code == 2 and outcome.says("is a pickle"), outcome.errors
    assert not (outcome.root / "canary").exists()


@pytest.mark.parametrize("kind", ["link to a folder", "link inside"])
def test_a_link_out_of_the_tokenised_data_is_not_followed(run: Run, kind: str) -> None:
    """The folder is replaced, for its records changed; what the link shows survives."""

    def edit(root: Path) -> None:
        (root / "victim/train").mkdir(parents=True)
        (root / "victim/train/precious").write_text("all my work", encoding="utf-8")
        if kind == "link to a folder":
            (root / "tokens").symlink_to(root / "victim")
        else:
            (root / "tokens").mkdir()
            (root / "tokens/train").symlink_to(root / "victim/train")

    outcome = run(BadInput(command="prepare", code=0, told="", edit=edit))
    assert outcome.code == (6 if kind == "link to a folder" else 0), outcome.errors
    precious = outcome.root / "victim/train/precious"
    assert precious.read_text(encoding="utf-8") == "all my work"
    assert "victim" not in outcome.folders


@pytest.mark.parametrize("name", ["latest", "state", "config.yaml", "log.txt", "metrics.jsonl"])
def test_links_in_a_run_folder_are_refused(run: Callable[..., Outcome], name: str) -> None:
    """A run writes, replaces and deletes there; what a link shows survives."""

    def edit(root: Path) -> None:
        (root / "victim").mkdir()
        (root / "victim/precious").write_text("all my work", encoding="utf-8")
        (root / "run").mkdir()
        (root / "run" / name).symlink_to(root / "victim")

    outcome = run(BadInput(code=0, told="", edit=edit), dry_run=False)
    assert outcome.code == 2 and outcome.says("run/.* is a symbolic link to"), outcome.errors
    assert "victim" not in outcome.folders


# --- Generated ----------------------------------------------------------------------------------

generated = settings(
    derandomize=True,
    max_examples=20,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from([2**31, 2**63, -(2**63), 10**400, "../../..", "\x1b[2J", "{{7}}", "%s"]),
)
contents = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = "run model data objective optim eval lens lr seed name output_dir student weights".split()


def check_anything(outcome: Outcome) -> None:
    """An input of any content is used or refused, never a traceback, never a mess."""
    assert outcome.code in CODES, outcome.errors
    assert "Traceback" not in outcome.output + outcome.errors
    if outcome.code:
        check_manners(outcome)
    assert outcome.folders <= {"tokens", "results"}


@generated
@given(line=st.binary(max_size=80) | contents.map(lambda c: json.dumps(c).encode()))
def test_any_line_of_records(run: Run, line: bytes) -> None:
    def edit(root: Path) -> None:
        (root / "data/toy/raw.jsonl").write_bytes(b"\n".join([GOOD] * 30 + [line]))

    check_anything(run(BadInput(code=3, told="", edit=edit)))


@generated
@given(
    content=st.binary(max_size=80)
    | st.text("{}[]:,&*!|>-?#'\"\n x1.", max_size=60).map(str.encode)
    | st.dictionaries(st.sampled_from(NAMES), contents, max_size=3).map(
        lambda c: json.dumps(c).encode()
    )
)
def test_any_yaml_file(run: Run, content: bytes) -> None:
    def edit(root: Path) -> None:
        (root / "layer.yaml").write_bytes(content)

    check_anything(run(BadInput(code=2, told="", flags=("--config", "ROOT/layer.yaml"), edit=edit)))


FLAG_NAMES = """
    --config --optim.lr --optim.epochs --run.seed --eval.seeds --objective.lens.teacher_layers
    --objective.lens.weights --data.train_size --run.max_wall_time --model.student_lora --deepspeed
    --model.student --data.path --run.name --objective.divergence --zzz
""".split()


@generated
@given(
    flags=st.lists(
        st.sampled_from(FLAG_NAMES)
        | st.text(max_size=12)
        | st.sampled_from(["../../x", "[1,", "{a: 1}", "-1", "1e999", "null", "\udcff", "a\0b"]),
        min_size=1,
        max_size=4,
    )
)
def test_any_flags(run: Run, flags: list[str]) -> None:
    if any(flag in ("-h", "--help") or flag.startswith("--print") for flag in flags):
        return
    check_anything(run(BadInput(code=2, told="", flags=tuple(flags))))


CONFIG_KEYS = """
    model_type n_layer n_embd n_head vocab_size n_positions activation_function dtype auto_map
    eos_token_id tie_word_embeddings quantization_config architectures num_labels rope_scaling
""".split()


@generated
@given(changes=st.dictionaries(st.sampled_from(CONFIG_KEYS), contents, min_size=1, max_size=2))
def test_any_config_json(run: Run, changes: dict[str, object]) -> None:
    check_anything(
        run(BadInput(command="evaluate", code=2, told="", edit=change(CONFIG, **changes)))
    )


TOKENIZER_KEYS = """
    eos_token bos_token tokenizer_class model_max_length added_tokens_decoder padding_side
    extra_special_tokens chat_template auto_map add_prefix_space clean_up_tokenization_spaces
""".split()


@generated
@given(changes=st.dictionaries(st.sampled_from(TOKENIZER_KEYS), contents, min_size=1, max_size=2))
def test_any_tokenizer_config(run: Run, changes: dict[str, object]) -> None:
    edit = change("student/tokenizer_config.json", **changes)
    check_anything(run(BadInput(code=2, told="", edit=edit)))
