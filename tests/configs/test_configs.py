"""Every file under configs/ loads in the layering that its folder stands for."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import yaml

from distilllens.config import TrainConfig, load_config, load_evaluate_config
from distilllens.errors import ConfigError
from distilllens.sweep.cells import (
    build_cells,
    evaluate_config,
    refused_options,
    unequal_options,
)
from distilllens.sweep.spec import read_sweep
from distilllens.training.deepspeed_file import DTYPES, load_deepspeed_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"


def names(folder: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / folder).glob("*.yaml"))


def flags(*layers: str) -> list[str]:
    return [part for layer in layers for part in ("--config", f"configs/{layer}.yaml")]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(("pair", "objective"), [*product(names("models"), names("objectives"))])
def test_every_pair_goes_with_every_objective(pair: str, objective: str) -> None:
    more = ("--data.generated", "answers") if objective == "seqkd" else ()
    config = load_config([*flags("base", f"models/{pair}", f"objectives/{objective}"), *more])
    baseline_of_kd = objective.startswith("hidden_")
    assert config.objective.approach == ("kd" if baseline_of_kd else objective)
    assert (config.objective.hidden.coeff > 0) == baseline_of_kd
    assert config.model.teacher
    assert Path(config.deepspeed).is_file()
    lens = config.objective.lens
    if lens.teacher_layers is not None and lens.student_layers is not None:
        assert len(lens.teacher_layers) == len(lens.student_layers)


@pytest.mark.parametrize("stage", names("quickstart"))
def test_quickstart_stage_loads(stage: str) -> None:
    layers = flags("base", "models/skills", "objectives/distill_lens", f"quickstart/{stage}")
    config = load_config(layers)
    assert config.optim.max_steps is not None
    assert config.data.path == "data/skills"


@pytest.mark.parametrize("protocol", names("eval"))
def test_evaluation_protocol_loads(protocol: str) -> None:
    config = load_evaluate_config(flags(f"eval/{protocol}"))
    assert config.sets
    # Sampled as in the paper, so that quick looks and full runs differ in size only.
    sampling = config.eval
    assert (sampling.do_sample, sampling.temperature, sampling.top_k) == (True, 1.0, 0)


@pytest.mark.parametrize("path", sorted((CONFIGS / "deepspeed").iterdir()), ids=lambda p: p.name)
def test_deepspeed_file_holds_what_its_name_says(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    stage, *offload, precision = path.stem.split("_")
    zero: dict[str, object] = {"stage": int(stage.removeprefix("zero"))}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    if "params" in offload:
        zero["offload_param"] = {"device": "cpu"}
    assert content["zero_optimization"] == zero
    assert offload in ([], ["offload"], ["offload", "params"])
    _, dtype = load_deepspeed_config(TrainConfig(deepspeed=str(path)))
    assert dtype == DTYPES[{"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[precision]]
    scale = {
        "initial_scale_power": 16,  # 65,536
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "min_loss_scale": 1,
    }
    settings = (
        {"fp16": {"enabled": True, **scale}}
        if precision == "fp16"
        else {"bf16": {"enabled": precision == "bf16"}}
    )
    assert content == {"zero_optimization": zero, **settings}


def test_no_16_bits_without_zero() -> None:
    """Stage 0 in bf16 makes the first updates too small; in fp16 it was not tried."""
    assert [path.name for path in (CONFIGS / "deepspeed").glob("zero0*")] == ["zero0_fp32.json"]


@pytest.mark.parametrize("name", names("sweeps"))
def test_sweep_is_valid_and_its_budget_is_equal_or_said_not_to_be(name: str) -> None:
    sweep = read_sweep(Path(f"configs/sweeps/{name}.yaml"))
    cells = build_cells(sweep)
    assert len(cells) == len(sweep.methods) * len(sweep.seeds) * max(1, len(sweep.lr))
    assert refused_options(sweep, cells) == {}
    differing = set(unequal_options({cell.method: cell.config for cell in cells}))
    differing -= {"optim.lr"} if sweep.lr else set()
    assert sorted(differing) == sorted(sweep.allow_unequal)
    first = cells[0]
    assert sweep.evaluation is not None
    assert evaluate_config(sweep, first.method, first.lr, first.seed).sets
    # Every method differs from the others in its objective, or in whose answers it learns from.
    objectives = {c.method: repr((c.config.objective, c.config.data)) for c in cells}
    assert len(set(objectives.values())) == len(sweep.methods)


@pytest.mark.parametrize("name", names("sweeps"))
def test_beside_gold_answers_a_sweep_trains_on_as_many_prompts(name: str) -> None:
    """With one answer to each prompt, kept gold answers make two records of it."""
    data = [
        cell.config.data for cell in build_cells(read_sweep(Path(f"configs/sweeps/{name}.yaml")))
    ]
    alone = {own.train_size for own in data if not own.keep_gold}
    assert len(alone) == 1
    for own in (own for own in data if own.keep_gold):
        assert {own.train_size} == {None if size is None else 2 * size for size in alone}


@pytest.mark.parametrize("pair", ["gpt2-base", "gpt2-medium", "tinyllama", "qwen2.5-1.5b"])
def test_the_papers_sweeps_have_the_papers_values(pair: str) -> None:
    cells = build_cells(read_sweep(Path(f"configs/sweeps/paper-{pair}.yaml")))
    for cell in cells:
        objective = cell.config.objective.approach
        more = ["--data.generated", "any"] if objective == "seqkd" else []
        layers = ("base", f"models/{pair}", f"objectives/{objective}", f"paper/{pair}-{objective}")
        paper = load_config([*flags(*layers), *more])
        assert (cell.config.optim, cell.config.model) == (paper.optim, paper.model)
        assert cell.config.objective.kd_ratio == paper.objective.kd_ratio


def test_every_file_is_covered_by_a_test() -> None:
    tested = {"models", "objectives", "quickstart", "eval", "deepspeed", "paper", "sweeps"}
    elsewhere = {"hostfiles"}  # test_launch.py
    assert {path.name for path in CONFIGS.iterdir()} == tested | elsewhere | {"base.yaml"}


def test_later_layers_win_and_lists_are_replaced(tmp_path: Path) -> None:
    layer = tmp_path / "mine.yaml"
    layer.write_text(yaml.safe_dump({"objective": {"lens": {"student_layers": [1, 2]}}}))
    base = flags("base", "models/gpt2-base", "objectives/distill_lens")
    config = load_config([*base, "--config", str(layer), "--objective.lens.coeff", "0.5"])
    assert config.objective.lens.student_layers == [1, 2]
    assert config.objective.lens.teacher_layers == [8, 16, 24, 32, 40]
    assert config.objective.lens.coeff == 0.5


def test_a_misspelt_key_of_a_layer_is_refused(tmp_path: Path) -> None:
    layer = tmp_path / "mine.yaml"
    layer.write_text("optim: {learning_rate: 1}\nobjectiv: {kd_ratio: 1}\n")
    with pytest.raises(ConfigError, match=r"optim\.learning_rate.*objectiv"):
        load_config([*flags("base"), "--config", str(layer)])
