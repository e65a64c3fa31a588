"""Layers of YAML and flags become one validated configuration, and wrong ones are named."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from distilllens.cli.cache_teacher import cache_teacher_main
from distilllens.cli.generate import generate_main
from distilllens.config import (
    EvalConfig,
    EvaluateConfig,
    LoraConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    dump_config,
    load_config,
    load_evaluate_config,
    parse_wall_time,
)
from distilllens.errors import ConfigError
from distilllens.parsing import build_parser

TEACHER = ("--model.teacher", "t")


def layer(folder: Path, name: str, content: str) -> str:
    """Writes a YAML file and returns its path."""
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return str(path)


def refusal(*flags: str) -> str:
    """Returns what a configuration is refused with."""
    with pytest.raises(ConfigError) as caught:
        load_config([*TEACHER, *flags])
    assert caught.value.exit_code == 2
    return caught.value.what


# --- Layers -------------------------------------------------------------------------------------


def test_later_layers_win_and_leave_the_rest(tmp_path: Path) -> None:
    first = layer(
        tmp_path, "1.yaml", "optim: {lr: 1, epochs: 3, warmup: 5}\nobjective: {lens: {count: 2}}"
    )
    second = layer(
        tmp_path, "2.yaml", "optim: {lr: 2, epochs: 4}\nobjective: {lens: {coeff: 0.25}}"
    )
    config = load_config(
        [*TEACHER, "--config", first, f"--config={second}", "--optim.lr", "3", "--optim.lr=4"]
    )
    assert (config.optim.lr, config.optim.epochs, config.optim.warmup) == (4.0, 4, 5.0)
    assert (config.objective.lens.count, config.objective.lens.coeff) == (2, 0.25)
    assert config.optim.lr_min == OptimConfig().lr_min
    swapped = load_config([*TEACHER, "--config", second, "--config", first])
    assert (swapped.optim.lr, swapped.optim.epochs) == (1.0, 3)
    assert swapped.objective.lens.coeff == 0.25


def test_lists_are_replaced_not_joined(tmp_path: Path) -> None:
    first = layer(tmp_path, "1.yaml", "eval: {seeds: [1, 2, 3]}")
    second = layer(tmp_path, "2.yaml", "eval: {seeds: [4]}")
    assert load_config([*TEACHER, "--config", first, "--config", second]).eval.seeds == [4]
    assert load_config([*TEACHER, "--config", first, "--eval.seeds", "[7, 8]"]).eval.seeds == [7, 8]


def test_an_optional_section_is_built_from_yaml_and_flags(tmp_path: Path) -> None:
    assert load_config(list(TEACHER)).model.student_lora is None
    file = layer(tmp_path, "lora.yaml", "model: {student_lora: {r: 4, alpha: 16}}")
    config = load_config([*TEACHER, "--config", file, "--model.student_lora.dropout", "0.5"])
    assert config.model.student_lora == LoraConfig(r=4, alpha=16.0, dropout=0.5)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-04", "0.0001", "+1e-4"])
def test_scientific_notation(tmp_path: Path, text: str) -> None:
    """YAML 1.1 reads 1e-4 as a string; a learning rate must still be a number."""
    file = layer(tmp_path, "lr.yaml", f"optim: {{lr: {text}}}")
    assert load_config([*TEACHER, "--config", file]).optim.lr == 1e-4
    assert load_config([*TEACHER, "--optim.lr", text]).optim.lr == 1e-4


def test_bare_switches() -> None:
    config = load_config([*TEACHER, "--dry_run", "--debug"])
    assert config.dry_run and config.debug
    config = load_config([*TEACHER, "--dry_run", "false", "--debug=false"])
    assert not config.dry_run and not config.debug
    config = load_config([*TEACHER, "--dry_run", "--optim.epochs", "2"])
    assert config.dry_run and config.optim.epochs == 2
    assert load_config([*TEACHER, "--dry_run", "True"]).dry_run
    assert load_evaluate_config(["--overwrite", "--limit", "3"]).overwrite


def test_sft_needs_no_teacher() -> None:
    assert load_config(["--objective.approach", "sft"]).model.teacher is None
    seqkd = ["--objective.approach", "seqkd", "--data.generated", "answers"]
    assert load_config(seqkd).model.teacher is None
    assert load_config(["--objective.kd_ratio", "0"]).model.teacher is None
    with pytest.raises(ConfigError, match=r"model.teacher is needed by objective.approach=kd"):
        load_config(["--objective.approach", "kd"])


# --- Refusals -----------------------------------------------------------------------------------


def test_unknown_keys_are_named_all_at_once_with_a_guess(tmp_path: Path) -> None:
    file = layer(tmp_path, "typo.yaml", "optim: {wamup: 3}\nlens: {coeff: 1}\nzzzz: 1")
    good = layer(tmp_path, "good.yaml", "optim: {warmup: 3}")
    told = refusal("--config", file, "--config", good, "--optim.lr_mni", "1", "--qqqq", "2")
    assert told.startswith("5 problems: ")
    assert f"{file}: unknown key optim.wamup (did you mean optim.warmup?)" in told
    assert f"{file}: unknown key lens.coeff (did you mean objective.lens.coeff?)" in told
    assert "unknown flag --optim.lr_mni (did you mean --optim.lr_min?)" in told
    assert f"{file}: unknown key zzzz;" in told and told.endswith("unknown flag --qqqq")


def test_flags_are_not_abbreviated() -> None:
    assert "unknown flag --optim.epoch (did you mean --optim.epochs?)" in refusal("--optim.epoch=3")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.lr", "fast"),
        ("optim.lr", "nan"),
        ("optim.epochs", "2.5"),
        ("optim.epochs", "true"),
        ("eval.seeds", "[1, a]"),
        ("eval.seeds", "7"),
        ("objective.lens.teacher_layers", "[1.5]"),
        ("objective.lens.norm", "fnal"),
        ("objective.divergence", "kl"),
        ("objective.approach", "seqdk"),
        ("model.gradient_checkpointing", "maybe"),
        ("tracking.wandb", "on"),
    ],
)
def test_wrong_types_and_choices(tmp_path: Path, key: str, value: str) -> None:
    told = refusal(f"--{key}", value)
    assert key in told and "\n" not in told
    content: Any = yaml.safe_load(value)
    for part in reversed(key.split(".")):
        content = {part: content}
    told = refusal("--config", layer(tmp_path, "wrong.yaml", yaml.safe_dump(content)))
    assert key in told


@pytest.mark.parametrize(
    "flags",
    [("--optim.lr",), ("stray",), ("-x",), ("--config",), ("--optim", "3")],
    ids=lambda flags: " ".join(flags),
)
def test_broken_command_lines(flags: tuple[str, ...]) -> None:
    assert "\n" not in refusal(*flags)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--run.seed -1", "run.seed=-1 must be ≥ 0"),
        ("--data.max_prompt_length 512", "data.max_prompt_length=512 must be < data.max_length"),
        (
            "--model.teacher_placement cpu --model.teacher_quantization 8bit",
            "model.teacher_placement=cpu needs teacher_quantization=none",
        ),
        ("--model.teacher_placement cpu --model.compile true", "model.compile needs model.teacher"),
        ("--model.teacher_quantization 4bit --model.compile true", "model.compile needs model.tea"),
        ("--data.train_size 0", "data.train_size=0 must be ≥ 1"),
        ("--objective.kd_ratio 1.1", "objective.kd_ratio=1.1 must be ≥ 0 and ≤ 1"),
        ("--objective.temperature 0", "objective.temperature=0.0 must be > 0"),
        ("--objective.beta 1", "objective.beta=1.0 must be > 0 and < 1"),
        ("--objective.mu 0", "objective.mu=0.0 must be > 0 and < 1"),
        ("--objective.alpha 1", "objective.alpha=1.0 must be > 0 and < 1"),
        ("--objective.rkl_coeff -1", "objective.rkl_coeff=-1.0 must be ≥ 0"),
        ("--objective.top_k 0", "objective.top_k=0 must be ≥ 1"),
        ("--objective.lens.top_k -3", "objective.lens.top_k=-3 must be ≥ 1"),
        ("--objective.lens.coeff -0.1", "objective.lens.coeff=-0.1 must be ≥ 0"),
        ("--objective.lens.beta 0", "objective.lens.beta=0.0 must be > 0 and < 1"),
        ("--objective.lens.count 0", "objective.lens.count=0 must be ≥ 1"),
        ("--objective.lens.every 0", "objective.lens.every=0 must be ≥ 1"),
        ("--objective.lens.rule every_n", "rule=every_n needs objective.lens.every"),
        ("--objective.lens.sample 0", "objective.lens.sample=0 must be ≥ 1"),
        ("--objective.lens.teacher_layers [1]", "must be given together"),
        ("--objective.lens.schedule_share 0", "lens.schedule_share=0.0 must be > 0 and ≤ 1"),
        ("--objective.lens.schedule_share 1.1", "lens.schedule_share=1.1 must be > 0 and ≤ 1"),
        (
            "--objective.lens.depth_weights deeper --objective.lens.weights [1,2]",
            "objective.lens.depth_weights and weights cannot both be given",
        ),
        ("--objective.hidden.coeff -1", "objective.hidden.coeff=-1.0 must be ≥ 0"),
        (
            "--objective.hidden.coeff 1 --objective.approach sft",
            "objective.hidden.coeff=1.0 needs objective.approach=kd or distill_lens",
        ),
        (
            "--objective.hidden.coeff 1 --objective.kd_ratio 0",
            "objective.hidden.coeff=1.0 needs objective.approach=kd or distill_lens, and",
        ),
        ("--optim.lr 0", "optim.lr=0.0 must be > 0"),
        ("--optim.lr_min 1", "optim.lr_min=1.0 must be ≤ optim.lr=0.0002"),
        ("--optim.warmup -1", "optim.warmup=-1.0 must be ≥ 0"),
        ("--optim.weight_decay -1", "optim.weight_decay=-1.0 must be ≥ 0"),
        ("--optim.clip_grad -1", "optim.clip_grad=-1.0 must be ≥ 0"),
        ("--optim.epochs 0", "optim.epochs=0 must be ≥ 1"),
        ("--optim.max_steps 0", "optim.max_steps=0 must be ≥ 1"),
        ("--optim.micro_batch_size 0", "optim.micro_batch_size=0 must be ≥ 1"),
        ("--optim.accumulation 0", "optim.accumulation=0 must be ≥ 1"),
        ("--tracking.log_every 0", "tracking.log_every=0 must be ≥ 1"),
        ("--eval.every 0", "eval.every=0 must be ≥ 1"),
        ("--eval.dev_size -1", "eval.dev_size=-1 must be ≥ 0"),
        ("--eval.batch_size 0", "eval.batch_size=0 must be ≥ 1"),
        ("--eval.seeds []", "eval.seeds must not be empty"),
        ("--eval.temperature 0", "eval.temperature=0.0 must be > 0"),
        ("--eval.top_p 0", "eval.top_p=0.0 must be > 0 and ≤ 1"),
        ("--eval.top_k -1", "eval.top_k=-1 must be ≥ 0"),
        ("--eval.no_repeat_ngram_size -1", "eval.no_repeat_ngram_size=-1 must be ≥ 0"),
        ("--eval.max_new_tokens 0", "eval.max_new_tokens=0 must be ≥ 1"),
        ("--model.student_lora.r 0", "model.student_lora.r=0 must be ≥ 1"),
        ("--model.student_lora.dropout 1", "student_lora.dropout=1.0 must be ≥ 0 and < 1"),
        ("--model.trust_remote_code true", "model.trust_remote_code needs model.revision"),
        ("--run.max_wall_time 90", "run.max_wall_time='90' is not HH:MM:SS"),
    ],
)
def test_ranges(flags: str, told: str) -> None:
    assert told in refusal(*flags.split())


@pytest.mark.parametrize("value", ["true", "1.5", "many"])
def test_top_k_is_a_whole_number(tmp_path: Path, value: str) -> None:
    assert "objective.lens.top_k" in refusal("--objective.lens.top_k", value)
    file = layer(tmp_path, "k.yaml", f"objective: {{top_k: {value}}}")
    assert "objective.top_k" in refusal("--config", file)


def test_all_values_out_of_range_are_told_at_once() -> None:
    told = refusal("--optim.lr", "-1", "--eval.top_p", "2", "--data.train_size", "0")
    assert told.startswith("3 problems: ")
    for name in ("optim.lr=-1.0", "eval.top_p=2.0", "data.train_size=0"):
        assert name in told


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    told = refusal("--config", str(missing), f"--config={tmp_path}")
    assert told.startswith("2 problems") and f"--config {missing}: no such file" in told
    assert "not YAML" in refusal("--config", layer(tmp_path, "a.yaml", "a: b: c"))
    assert "expected a mapping of sections" in refusal(
        "--config", layer(tmp_path, "b.yaml", "[1, 2]")
    )
    assert "expected a mapping of sections" in refusal("--config", layer(tmp_path, "c.yaml", ""))
    (tmp_path / "d.yaml").write_bytes(b"run: {name: \xff\xfe}")
    assert "not YAML" in refusal("--config", str(tmp_path / "d.yaml"))


@pytest.mark.parametrize("content", ["optim: 3", "objective: {lens: [1]}"])
def test_a_section_that_is_no_mapping(tmp_path: Path, content: str) -> None:
    assert "mapping" in refusal("--config", layer(tmp_path, "a.yaml", content))


def test_evaluation_is_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"eval\.top_p=0\.0"):
        load_evaluate_config(["--eval.top_p", "0"])
    with pytest.raises(ConfigError, match=r"unknown flag --sers \(did you mean"):
        load_evaluate_config(["--sers", "[dolly]"])


@pytest.mark.parametrize(
    "asked",
    [
        ["--backend", "vllm"],
        ["--similarity", "model"],
        ["--token_metrics", "true"],
        ["--exposure_bias", "true", "--teacher", "t"],
    ],
)
def test_tasks_of_lm_eval_leave_nothing_out_in_silence(asked: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"harness runs without .*{asked[0][2:]}"):
        load_evaluate_config(["--harness", "arc_easy", *asked])
    load_evaluate_config(asked)
    with pytest.raises(ConfigError, match="need harness"):
        load_evaluate_config(["--harness_fewshot", "0"])


@pytest.mark.parametrize(
    ("text", "seconds"), [("0:00:00", 0), ("01:02:03", 3723), ("100:00:01", 360_001)]
)
def test_wall_time(text: str, seconds: float) -> None:
    assert parse_wall_time(text) == seconds


@pytest.mark.parametrize("text", ["1:00", "1:60:00", "1:00:60", "-1:00:00", "1:00:00 ", "x"])
def test_wall_times_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not HH:MM:SS"):
        parse_wall_time(text)


# --- There and back -----------------------------------------------------------------------------

# Texts that YAML could take for something else; "null" alone stands for None by intention.
texts = st.sampled_from(["x", "10", "yes", "1:30:00", "ä # b", "a: b", "[1]", "~x", "it's", " "])
shares = st.floats(0.01, 0.99)
configs = st.builds(
    TrainConfig,
    run=st.builds(RunConfig, name=st.none() | texts, output_dir=texts, seed=st.integers(0, 2**40)),
    objective=st.builds(
        ObjectiveConfig,
        approach=st.just("sft"),
        divergence=st.sampled_from(["fkl", "fkl+rkl", "skew_rkl"]),
        kd_ratio=st.floats(0, 1),
        alpha=shares,
        temperature=st.floats(1e-6, 1e6),
    ),
    optim=st.builds(
        OptimConfig,
        lr=st.floats(1e-6, 10),
        warmup=st.floats(0, 1e5),
        epochs=st.integers(1, 10**6),
        max_steps=st.none() | st.integers(1, 10**9),
    ),
    eval=st.builds(EvalConfig, seeds=st.lists(st.integers(0, 2**31), min_size=1, max_size=4)),
    deepspeed=texts,
    dry_run=st.booleans(),
)


@settings(
    max_examples=20,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # 0.1 s a case: shrinking takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(config=configs)
def test_a_dumped_configuration_loads_as_the_same(tmp_path: Path, config: TrainConfig) -> None:
    file = layer(tmp_path, "dumped.yaml", dump_config(config))
    assert load_config(["--config", file]) == config


def test_texts_that_look_like_numbers_come_back(tmp_path: Path) -> None:
    config = load_config([*TEACHER, "--model.revision", "1234e56"])
    assert load_config(["--config", layer(tmp_path, "d.yaml", dump_config(config))]) == config


def test_the_resolved_lists_and_adapters_come_back(tmp_path: Path) -> None:
    flags = [
        *TEACHER,
        *("--objective.lens.teacher_layers", "[2, 4]"),
        *("--objective.lens.student_layers", "[1, 2]"),
        *("--objective.lens.weights", "[0.5, 1e-3]"),
        *("--model.student_lora.r", "2", "--run.max_wall_time", "1:30:00"),
    ]
    config = load_config(flags)
    assert config.objective.lens.weights == [0.5, 0.001]
    assert load_config(["--config", layer(tmp_path, "d.yaml", dump_config(config))]) == config


# --- Help ---------------------------------------------------------------------------------------


def leaves(config: Any, prefix: str = "") -> Iterator[str]:
    """Yields the full name of every option that is not a section."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


@pytest.mark.parametrize(
    ("config_class", "at_least"),
    [(TrainConfig, 65), (EvaluateConfig, 20), (LoraConfig, 3)],
    ids=["train", "eval", "adapter"],
)
def test_help_explains_every_option(config_class: type, at_least: int) -> None:
    text = build_parser(config_class, prog="x.py").format_help()
    entries = dict(re.findall(r"^  --([\w.]+)((?:.*\n?(?!  -|\n|\S))*.*)$", text, re.MULTILINE))
    names = list(leaves(config_class()))
    assert len(names) >= at_least
    for name in names:
        entry = " ".join(entries[name].split())
        explanation, found, _ = entry.partition("(type: ")
        assert found and "default: " in entry, f"--{name}: no type or default: {entry}"
        # The name in capitals or the choices stand first; what remains explains.
        words = re.sub(r"^(\{[^}]*\}|\[[^]]*\]|\S+)(, --\S+ \S+)?", "", explanation).split()
        assert words, f"--{name} has no explanation: {entry}"


# --- Help and messages in a user's words --------------------------------------------------------


def help_of(capsys: pytest.CaptureFixture[str], call: Callable[[list[str]], object]) -> str:
    with pytest.raises(SystemExit) as caught:
        call(["--help"])
    assert caught.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_shows_options_alone(capsys: pytest.CaptureFixture[str]) -> None:
    told = help_of(capsys, load_config)
    assert "Path to a configuration file" not in told and ".help" not in told
    assert "--run " not in told and "--objective.lens " not in told
    for key, meaning in {
        "r": "Rank. Range: ≥ 1. Default: 8.",
        "alpha": "alpha / r. Default: 32.0.",
        "dropout": "input. Range: ≥ 0 and < 1. Default: 0.0.",
    }.items():
        assert f"--model.student_lora.{key}: " in told and meaning in told


def test_each_command_with_a_trainings_options_says_what_it_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "Train a student" in help_of(capsys, load_config)
    for command, written in (
        (generate_main, "writes raw.jsonl and generation.json into data.generated"),
        (cache_teacher_main, "manifest.json into model.teacher_cache"),
    ):
        told = help_of(capsys, command)
        assert written in told and "Train a student" not in told


@pytest.mark.parametrize(
    ("flags", "what", "fix"),
    [
        (
            ["--objective.divergence", "klf"],
            "objective.divergence must be one of fkl, rkl, fkl+rkl, jsd, akl, skew_fkl, skew_rkl, "
            "tvd, got klf",
            "python train.py --help",
        ),
        (
            ["--objective.lens.teacher_layers", "3,4"],
            "objective.lens.teacher_layers must be a list of whole numbers or null, got 3,4",
            "--objective.lens.teacher_layers '[3,4]'",
        ),
        (["--optim.lr", "fast"], "optim.lr must be a number > 0, got fast", "--help"),
        (["--eval.every", "1.5"], "eval.every must be a whole number ≥ 1 or null, got 1.5", ""),
        (["--data.packing", "3"], "data.packing must be true or false, got 3", ""),
        (
            ["--model.student_lora.r", "x"],
            "model.student_lora.r must be a whole number ≥ 1, got x",
            "",
        ),
        (["--dry-run"], "unknown flag --dry-run (did you mean --dry_run?)", ""),
        (["--eval", "few.yaml"], "--eval is a section: give its keys, as --eval.KEY", ""),
    ],
)
def test_wrong_values_are_told_in_a_users_words(flags: list[str], what: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([*TEACHER, *flags])
    assert what in caught.value.what and fix in caught.value.fix
    assert "class" not in caught.value.format() and "Parser" not in caught.value.format()


def test_a_set_without_brackets() -> None:
    with pytest.raises(ConfigError, match="sets must be a list of texts, got dolly") as caught:
        load_evaluate_config(["--sets", "dolly"])
    assert "--sets '[dolly]'" in caught.value.fix


def test_a_file_of_another_name_is_shown(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("{}")
    with pytest.raises(ConfigError) as caught:
        load_config([*TEACHER, "--config", str(tmp_path / "basee.yaml")])
    assert f"no such file (did you mean {tmp_path}/base.yaml?)" in caught.value.what
    assert caught.value.fix == ""
    assert "no such file\n" in refusal("--config", "no/where.yaml") + "\n"
