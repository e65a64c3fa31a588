"""From a configuration to everything a run needs: first what costs nothing, then the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from distilllens.config import ModelConfig, TrainConfig
from distilllens.data.tokenize import PreparedData, prepare_dataset
from distilllens.errors import ConfigError, DataError
from distilllens.families import compile_blocks, freeze_unreached_, no_decay_parameters
from distilllens.hidden import HiddenComparison
from distilllens.kernels.chunks import Unembedding
from distilllens.layers import LayerPair, build_layer_pairs
from distilllens.lens import LogitLens
from distilllens.models import (
    check_same_tokens,
    context_length,
    load_model_config,
    load_student,
    load_teacher,
    load_tokenizer,
    num_blocks,
    quantization_settings,
    shared_vocab_size,
    vocab_rows,
)
from distilllens.objective import DistillationObjective
from distilllens.runtime import distributed
from distilllens.runtime.nodes import refuse_together
from distilllens.student import DistillationModule, Teacher
from distilllens.teacher.cache import CachedTeacher, open_teacher_cache
from distilllens.teacher.sharding import divide_body
from distilllens.training.deepspeed_file import DTYPES, load_deepspeed_config


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run as far as it is known before weights are loaded; made without a process group."""

    config: TrainConfig
    deepspeed: dict[str, Any]
    dtype: torch.dtype
    teacher_dtype: torch.dtype
    student_config: PretrainedConfig
    teacher_config: PretrainedConfig | None
    tokenizer: PreTrainedTokenizerBase
    pairs: list[LayerPair]
    objective: DistillationObjective
    vocab_size: int
    notes: list[str]
    """What the user should be told."""
    divergence_KT: list[list[float]] | None = None
    """What `layer_choice` has measured: lens divergence of each pair's student block and every
    teacher block, in nats."""

    @property
    def pairs_are_open(self) -> bool:
        """Whether the teacher's blocks in ``pairs`` only stand in for those to be measured."""
        is_measured = self.config.objective.lens.rule == "lens_similarity"
        return bool(self.pairs) and is_measured and self.divergence_KT is None

    @property
    def zero_stage(self) -> int:
        """ZeRO stage of the DeepSpeed file."""
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))

    @property
    def optimizer_device(self) -> torch.device | None:
        """Where the DeepSpeed file keeps the optimizer's states, if not on the run's device."""
        offload = self.deepspeed.get("zero_optimization", {}).get("offload_optimizer") or {}
        return torch.device("cpu") if offload.get("device", "none") == "cpu" else None


def plan_run(config: TrainConfig) -> Plan:
    """Reads model configurations and tokenizers and checks that all fits together.

    Raises:
        ConfigError: Models, tokenizers, layers or the DeepSpeed file are missing or do not fit.
    """
    trust, revision = config.model.trust_remote_code, config.model.revision

    def model_config(path: str, option: str) -> PretrainedConfig:
        return load_model_config(path, trust_remote_code=trust, revision=revision, option=option)

    def model_tokenizer(path: str, option: str) -> PreTrainedTokenizerBase:
        return load_tokenizer(path, trust_remote_code=trust, revision=revision, option=option)

    deepspeed_config, dtype = load_deepspeed_config(config)
    student_config = model_config(config.model.student, "--model.student")
    _check_dev_metric(config, deepspeed_config)
    outline = DistillationObjective(config.objective)  # without pairs, which need the teacher
    teacher_config, pairs, notes = None, [], []
    vocab_size = vocab_rows(student_config)
    if outline.needs_teacher:
        assert config.model.teacher is not None
        teacher_config = model_config(config.model.teacher, "--model.teacher")
        if outline.needs_pairs:
            pairs = _layer_pairs(config, teacher_config, student_config)
    tokenizer = model_tokenizer(config.model.student, "--model.student")
    if teacher_config is not None:
        assert config.model.teacher is not None
        check_same_tokens(model_tokenizer(config.model.teacher, "--model.teacher"), tokenizer)
        vocab_size, note = shared_vocab_size(vocab_rows(teacher_config), vocab_size, len(tokenizer))
        notes += [note] if note else []
        notes += _teacher_notes(config.model)
    teacher_dtype = config.model.teacher_dtype
    quantization_settings(config.model.teacher_quantization, dtype)  # is it installed?
    return Plan(
        config=config,
        deepspeed=deepspeed_config,
        dtype=dtype,
        teacher_dtype=dtype if teacher_dtype == "auto" else DTYPES[teacher_dtype],
        student_config=student_config,
        teacher_config=teacher_config,
        tokenizer=tokenizer,
        pairs=pairs,
        objective=DistillationObjective(config.objective, pairs),
        vocab_size=vocab_size,
        notes=notes,
    )


def _check_dev_metric(config: TrainConfig, deepspeed_config: dict[str, Any]) -> None:
    """Refuses answers by several processes that each hold a part of the student."""
    stage = deepspeed_config.get("zero_optimization", {}).get("stage", 0)
    alone = distributed.environment_world_size() == 1
    if stage == 3 and config.eval.metric == "rougeL" and config.eval.dev_size > 0 and not alone:
        raise ConfigError(
            "eval.metric=rougeL does not go with ZeRO stage 3 and several processes",
            why="each answers prompts of its own, and would wait for others' parts",
            fix="--eval.metric loss, or a zero1 or zero2 file",
        )


def _teacher_notes(model: ModelConfig) -> list[str]:
    """Tells where and how the teacher is kept, if not whole on each device."""
    if model.teacher_cache is not None:
        return []
    if model.teacher_quantization != "none":
        return [f"teacher's linear layers in {model.teacher_quantization}, all but its head"]
    places = {"sharded": "on the devices", "cpu": "in the memory of the CPUs"}
    if model.teacher_placement == "device":
        return []
    return [f"teacher's body in one part per process, {places[model.teacher_placement]}"]


def _layer_pairs(
    config: TrainConfig, teacher: PretrainedConfig, student: PretrainedConfig
) -> list[LayerPair]:
    lens = config.objective.lens
    rule = lens.rule
    if rule == "lens_similarity" and lens.teacher_layers is None:
        if config.model.teacher_cache is not None:
            raise ConfigError(
                "objective.lens.rule=lens_similarity cannot be used with model.teacher_cache",
                why="a cache holds the teacher's layers of known pairs; these are measured on the "
                "teacher itself",
                fix="start the run once without the cache, and give the pairs of its layers.json: "
                "--objective.lens.rule explicit --objective.lens.teacher_layers [..] "
                "--objective.lens.student_layers [..]",
            )
        if config.model.teacher_placement != "device":
            raise ConfigError(
                "objective.lens.rule=lens_similarity needs model.teacher_placement=device, not "
                f"{config.model.teacher_placement}",
                why="the first process measures alone, with a whole teacher",
                fix="measure once on one device, and give the pairs of its layers.json as lists",
            )
        rule = "proportional"  # the student's blocks; `layer_choice` finds the teacher's
    return build_layer_pairs(
        num_blocks(teacher),
        num_blocks(student),
        teacher=lens.teacher_layers,
        student=lens.student_layers,
        rule=rule,
        count=lens.count,
        every=lens.every,
    )


def load_data(plan: Plan) -> PreparedData:
    """Tokenises the records once, on the first process; the others wait and open the result.

    Raises:
        DataError: Broken records, none usable, or fewer than one global batch; on all processes,
            if one of them does not find what the first has made.
    """
    prepare = partial(
        prepare_dataset,
        data=plan.config.data,
        dev_size=plan.config.eval.dev_size,
        tokenizer=plan.tokenizer,
        family=plan.student_config.model_type,
    )
    # A dry run stores nothing, so there each process has its own.
    data = prepare(write=False) if plan.config.dry_run else _prepare_together(prepare)
    _check_positions(plan, data)
    return data


def _prepare_together(prepare: Callable[..., PreparedData]) -> PreparedData:
    own: list[PreparedData] = []
    distributed.on_main(lambda: own.append(prepare()))
    data, refusal = (own[0] if own else None), None
    if data is None:
        try:
            data = prepare(build=False)
        except DataError as error:
            refusal = error
    refuse_together("the tokenised data that the first process has made", refusal)
    assert data is not None
    return data


def _check_positions(plan: Plan, data: PreparedData) -> None:
    """Refuses records that are longer than a model's positions."""
    longest = max(data.stats[part]["longest"] for part in ("train", "dev"))
    models = {"student": plan.student_config, "teacher": plan.teacher_config}
    for role, config in models.items():
        positions = None if config is None else context_length(config)
        if positions is not None and longest > positions:
            raise ConfigError(
                f"the longest record has {longest} tokens, the {role} has {positions} positions",
                fix=f"--data.max_length {positions} cuts longer answers",
            )


@dataclass(frozen=True, kw_only=True)
class StepCount:
    """How long a run is."""

    records: int
    global_batch: int
    steps_per_epoch: int
    total_steps: int


def count_steps(config: TrainConfig, num_records: int, world_size: int) -> StepCount:
    """Works out optimizer steps per epoch and in all; an epoch's last partial batch is left out.

    Raises:
        DataError: Fewer records than one global batch.
    """
    optim = config.optim
    global_batch = optim.micro_batch_size * optim.accumulation * world_size
    steps_per_epoch = num_records // global_batch
    if steps_per_epoch == 0:
        raise DataError(
            f"{num_records} training records of {config.data.path} are fewer than one global batch "
            f"of {global_batch}",
            why=f"{optim.micro_batch_size} per process × {optim.accumulation} accumulated × "
            f"{world_size} processes",
            fix="lower --optim.micro_batch_size or --optim.accumulation",
        )
    return StepCount(
        records=num_records,
        global_batch=global_batch,
        steps_per_epoch=steps_per_epoch,
        total_steps=optim.max_steps or optim.epochs * steps_per_epoch,
    )


def build_teacher(
    plan: Plan, data: PreparedData, device: torch.device
) -> tuple[Teacher | CachedTeacher | None, Unembedding | None]:
    """Loads the teacher, or opens its stored rows; returns it and its head on ``device``.

    Raises:
        ConfigError: Weights cannot be loaded, the lens does not give the model's own logits, or
            the stored rows are not of this teacher and data.
        CheckpointError: Stored rows are damaged.
    """
    if plan.teacher_config is None:
        return None, None
    layers = [pair.teacher for pair in plan.objective.pairs]
    if plan.config.model.teacher_cache is not None:
        cached = open_teacher_cache(
            plan.config,
            teacher_config=plan.teacher_config,
            teacher_dtype=plan.teacher_dtype,
            teacher_layers=layers,
            data=data,
        )
        return cached, cached.unembedding(device)
    teacher = run_teacher(plan, data, device)
    return teacher, teacher.unembedding()


def run_teacher(plan: Plan, data: PreparedData, device: torch.device) -> Teacher:
    """Loads the teacher's weights and proves its lens.

    Raises:
        ConfigError: Weights cannot be loaded, or the lens does not give the model's own logits.
    """
    model: nn.Module = load_teacher(plan.config.model, dtype=plan.teacher_dtype)
    placement = plan.config.model.teacher_placement
    if placement == "device":
        engine = None
        model.to(device)
    else:
        engine = divide_body(model, device, dtype=plan.teacher_dtype, on_cpu=placement == "cpu")
    lens = LogitLens(model, plan.config.objective.lens.norm)
    prove_lens(lens, plan, data, device)
    return Teacher(lens, [pair.teacher for pair in plan.objective.pairs], engine)


def build_module(
    plan: Plan, data: PreparedData, device: torch.device, teacher_unembedding: Unembedding | None
) -> DistillationModule:
    """Loads the student, proves its lens, and joins student, objective and projectors.

    In ZeRO stage 3 the student may be larger than the device: it stays on the CPU until
    `divide_weights`, and its lens is to be proved after that. (The device that measures layer pairs
    takes it whole.)

    Args:
        plan: Of the run.
        data: The first record serves the checks.
        device: Where the model goes.
        teacher_unembedding: The teacher's head, on ``device``; None without a teacher.

    Raises:
        ConfigError: Weights cannot be loaded, or the lens does not give the model's own logits.
    """
    student = load_student(plan.config.model, dtype=plan.dtype)
    if plan.zero_stage < 3 or plan.pairs_are_open:
        student.to(device)
    lens = LogitLens(student, plan.config.objective.lens.norm)
    if plan.zero_stage < 3:
        prove_lens(lens, plan, data, device)
    freeze_unreached_(student, lens.parts)
    hidden = None
    if plan.objective.hidden_pairs:
        assert teacher_unembedding is not None
        hidden = HiddenComparison(
            len(plan.objective.hidden_pairs),
            lens.parts.head.in_features,
            teacher_unembedding.head_VD.shape[1],
            loss=plan.objective.hidden_loss,
            seed=plan.config.run.seed,
        ).to(lens.parts.head.weight.device, plan.dtype)
    return DistillationModule(
        student,
        objective=plan.objective,
        lens=lens,
        teacher_unembedding=teacher_unembedding,
        vocab_size=plan.vocab_size,
        hidden=hidden,
    )


def divide_weights(module: nn.Module, plan: Plan, device: torch.device) -> None:
    """Divides weights over the processes for ZeRO stage 3; all of them must call it.

    One after the other goes to the device, is divided there and freed. `deepspeed.initialize` would
    put the whole module there first.

    Args:
        module: Whole, on the CPU or on the device; changed in place.
        plan: Of the run; its DeepSpeed file says where the shares stay.
        device: Of this process.
    """
    import deepspeed  # two seconds that --help need not pay

    for parameter in module.parameters():
        parameter.data = parameter.data.to(plan.dtype)  # adapters come in float32
    deepspeed.zero.Init(module=module, config_dict_or_path=plan.deepspeed)
    module.to(device)  # buffers


def prove_lens(lens: LogitLens, plan: Plan, data: PreparedData, device: torch.device) -> None:
    """Checks a model's lens; then the model is compiled, if that is asked for.

    Args:
        lens: Of a model that runs: all processes must call it together if it is divided.
        plan: Of the run.
        data: The first record serves the checks.
        device: Where the model runs.

    Raises:
        ConfigError: The lens does not give the model's own logits, or packed records see each
            other.
    """
    import deepspeed  # its gathering does nothing where nothing is divided

    check_ids_BT = torch.tensor([data.train[0]["prompt_ids"][:16]], device=device)
    lens.self_check(check_ids_BT, gather=deepspeed.zero.GatheredParameters)
    if plan.config.data.packing:
        lens.packing_check(check_ids_BT)
    if plan.config.model.compile:
        compile_blocks(lens.parts)


def build_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Returns AdamW over the trainable parameters; norms and biases are not decayed."""
    exempt = no_decay_parameters(module)
    trainable = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for n, p in trainable if n not in exempt],
            "weight_decay": config.optim.weight_decay,
        },
        {"params": [p for n, p in trainable if n in exempt], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.optim.lr,
        fused=True,  # on a CPU too: seven times as fast there, and it can refuse an update
    )
