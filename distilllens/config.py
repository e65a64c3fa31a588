"""Every option of the project: typed, frozen, documented below each field.

A command line is made of YAML layers and flags, later ones win::

    python train.py --config configs/base.yaml --config configs/models/gpt2-base.yaml \\
        --optim.lr 1e-4 --objective.lens.coeff 0.5

``--print_config`` prints the result as YAML, which run again with ``--config`` gives the same run.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from annotated_types import Ge, Interval

from distilllens.errors import ConfigError
from distilllens.parsing import parse_arguments, raise_problems
from distilllens.ranges import Count, InnerShare, Positive, Share, Weight, Whole

CE_ONLY = ("sft", "seqkd")
"""Approaches that compare with no teacher."""

LayerRule = Literal["proportional", "every_n", "last_k", "explicit", "lens_similarity"]
DivergenceKind = Literal["fkl", "rkl", "fkl+rkl", "jsd", "akl", "skew_fkl", "skew_rkl", "tvd"]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run writes, its seed, and when it stops."""

    output_dir: str = "results/train/run"
    """Folder of this run: latest/, best/, metrics.jsonl, config.yaml, log.txt."""
    name: str | None = None
    """Name in reports and trackers; default: the last parts of output_dir."""
    seed: Whole = 10
    """Seed of data order, dropout and initialisation."""
    resume: str = "auto"
    """auto: go on from the newest checkpoint of output_dir, or start; must: go on or fail;
    never: start in an empty folder; or the PATH of a checkpoint."""
    max_wall_time: str | None = None
    """Time limit HH:MM:SS; the run then saves and ends with exit code 75."""
    allow_changes: bool = False
    """Go on from a checkpoint although options, data or tokenizer differ from those it was saved
    with; what differs is told."""
    timeout: str = "00:30:00"
    """Time HH:MM:SS that processes wait for one another, for example while one tokenises, before
    they take the others for dead and end with exit code 7."""
    keep: Annotated[int, Ge(2)] = 2
    """Newest checkpoints that stay; the one that the run went on from stays besides."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A low-rank adapter on every linear layer of the student's blocks."""

    r: Count = 8
    """Rank."""
    alpha: float = 32.0
    """Scale; the update is multiplied by alpha / r."""
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The student, the teacher and their precision."""

    student: str = "checkpoints/gpt2-base"
    """Folder (or hub name) of the student, a Hugging Face causal language model."""
    teacher: str | None = None
    """Folder (or hub name) of the frozen teacher; needed by kd and distill_lens."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Training precision; auto: bfloat16 or float16 if the DeepSpeed file enables it, else
    float32."""
    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The teacher's precision; auto: the same as dtype (when it generates: if that is auto too, the
    checkpoint's)."""
    teacher_quantization: Literal["none", "8bit", "4bit"] = "none"
    """Keep the teacher's linear layers in 8 or 4 bits (bitsandbytes); its norms and its head, which
    the lens reads, stay in teacher_dtype. A teacher_lora then runs beside them, not merged."""
    teacher_placement: Literal["device", "cpu", "sharded"] = "device"
    """device: whole on each device; sharded: its body in parts, one per process, gathered block by
    block (ZeRO-3); cpu: the parts stay in the memory of the CPUs and are streamed from there."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation of both models; auto: what transformers chooses."""
    gradient_checkpointing: bool = False
    """Recompute the student's blocks in the backward pass: less memory, about a third slower."""
    compile: bool = False
    """Compile the blocks of both models with torch.compile; costs a minute or so at the start."""
    teacher_cache: str | None = None
    """Folder of the teacher's hidden states, made by `python -m distilllens cache-teacher` with
    the same options; training then reads them and never runs the teacher."""
    teacher_cache_bits: Literal[8, 16, 32] = 16
    """Stored as float32, bfloat16, or 8 bits with one scale per row."""
    student_lora: LoraConfig | None = None
    """Train an adapter instead of all weights; exports are merged."""
    teacher_lora: str | None = None
    """Folder of an adapter that is merged into the teacher."""
    trust_remote_code: bool = False
    """Run the Python code that a model folder brings along. Only with a pinned revision."""
    revision: str | None = None
    """Commit hash of the student's and teacher's hub repositories."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training records and how they become tokens."""

    path: str = "data/dolly"
    """Folder with raw.jsonl (its first eval.dev_size records are the dev set, the rest trains)."""
    generated: str | None = None
    """Folder made by `python -m distilllens generate` with the same options: its answers replace
    the records' answers in training; the dev set stays data.path's."""
    keep_gold: bool = False
    """Train on the records' own answers too; needs generated."""
    processed: str | None = None
    """Folder of the tokenised data, made anew where it does not fit; default: one for each choice
    of tokenizer, lengths and records, processed_data/NAME/{full,generated-FOLDER}/FAMILY-HASH."""
    max_length: Annotated[int, Ge(2)] = 512
    """Longest prompt + response in tokens; longer responses are cut."""
    max_prompt_length: Count = 256
    """Longest prompt in tokens; records with longer prompts are dropped, counted and told."""
    train_size: Count | None = None
    """Use only the first N training records; default: all. Each answer counts as one: with
    keep_gold and one answer to each prompt, N are of N / 2 prompts."""
    bad_lines: Literal["error", "skip"] = "error"
    """What a broken record does: stop with file and line, or skip it and count."""
    group_by_length: bool = True
    """Batches of similar length: less padding, the same records in each epoch."""
    packing: bool = False
    """Records of a micro-batch share rows instead of being padded to the longest; attention stays
    within each record. Needs a model whose attention knows position ids (sdpa, flash)."""


@dataclass(frozen=True, kw_only=True)
class LensConfig:
    """The divergence between the lenses of paired layers."""

    coeff: Weight = 1.0
    """λ, the weight of the lens term against the final divergence."""
    divergence: DivergenceKind = "jsd"
    """Kind of divergence; the method asks for a symmetric one: jsd or fkl+rkl."""
    beta: InnerShare = 0.5
    """Weight of the teacher in the jsd's mixture."""
    top_k: Count | None = None
    """As objective.top_k, for the lens: each layer's own likeliest tokens; default: all tokens."""
    mu: InnerShare = 0.5
    """akl: cumulative teacher probability of the head."""
    alpha: InnerShare = 0.1
    """skew_fkl, skew_rkl: share of the KL's first argument in the mixture."""
    fkl_coeff: Weight = 1.0
    """fkl+rkl: weight of the forward KL; unequal weights make the lens asymmetric."""
    rkl_coeff: Weight = 1.0
    """fkl+rkl: weight of the reverse KL."""
    norm: Literal["final", "none"] = "final"
    """final: the model's own final norm before the head; none: as in the published code."""
    train_head: bool = True
    """Let the lens term train the student's LM head too."""
    teacher_layers: list[int] | None = None
    """Teacher blocks, i is the output of block i counted from 1; default: by rule. Lists that are
    given hold with the rules proportional (the default) and explicit; others refuse them."""
    student_layers: list[int] | None = None
    """Student blocks, as many as teacher_layers."""
    rule: LayerRule = "proportional"
    """How layers are paired. proportional: at equal shares of the depth; every_n: student blocks
    every, 2 · every, … and the teacher's at the same depth; last_k: the count blocks before each
    model's last; explicit: teacher_layers and student_layers must be given; lens_similarity: the
    student blocks of proportional, each with the teacher block whose lens is most like its own
    before training, in order. No rule takes a model's last block."""
    count: Count = 5
    """Number of pairs of proportional, last_k and lens_similarity."""
    every: Count | None = None
    """every_n: the n."""
    sample: Count = 32
    """lens_similarity: training records to measure on, drawn by run.seed."""
    weights: list[float] | None = None
    """One weight for each pair, in order, scaled to a mean of 1; default: all equal."""
    depth_weights: Literal["equal", "deeper", "shallower"] = "equal"
    """deeper: pairs weigh by the student block's number; shallower: mirrored; mean 1. Not together
    with weights."""
    schedule: Literal["constant", "ramp", "decay", "deepest_first", "shallowest_first"] = "constant"
    """λ over the run; ramp: rises in a line from 0, then stays; decay: falls in a line to 0 at the
    last step; deepest_first, shallowest_first: pairs join one after another, by the student's
    block, each rising in a line from 0. The mean is over all pairs, joined or not."""
    schedule_share: Annotated[float, Interval(gt=0, le=1)] = 0.5
    """Share of all steps in which λ rises or falls, or all pairs join."""


@dataclass(frozen=True, kw_only=True)
class HiddenConfig:
    """The distance between hidden states of the lens section's layer pairs: a baseline.

    Student rows go through one trained matrix a pair, which is no part of the exported student.
    The rows are those that the lens sees, so lens.norm says whether they are normed. Pairs weigh
    equally.
    """

    coeff: Weight = 0.0
    """Weight of the hidden-state term against the final divergence; 0: none. For kd and
    distill_lens."""
    loss: Literal["mse", "cosine"] = "mse"
    """mse: mean squared difference over the teacher's width; cosine: 1 − cosine of both rows."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """(1 − kd_ratio) · CE + kd_ratio · [final divergence + lens.coeff · lens + hidden states]."""

    approach: Literal["sft", "seqkd", "kd", "distill_lens"] = "distill_lens"
    """sft: cross entropy only; seqkd: the same on the answers of data.generated; kd: with the final
    divergence; distill_lens: with the lens too."""
    divergence: DivergenceKind = "rkl"
    """Divergence between the final distributions of teacher and student."""
    kd_ratio: Share = 1.0
    """ρ, the share of distillation against cross entropy on the records' answers."""
    temperature: Positive = 1.0
    """Both logits are divided by T and the final divergence is multiplied by T²; lens: T = 1."""
    beta: InnerShare = 0.5
    """Weight of the teacher in the jsd's mixture."""
    mu: InnerShare = 0.5
    """akl: cumulative teacher probability of the head."""
    alpha: InnerShare = 0.1
    """skew_fkl, skew_rkl: share of the KL's first argument in the mixture."""
    fkl_coeff: Weight = 1.0
    """fkl+rkl: weight of the forward KL."""
    rkl_coeff: Weight = 1.0
    """fkl+rkl: weight of the reverse KL."""
    top_k: Count | None = None
    """Compare the teacher's k likeliest tokens and one bucket for all others; default: all
    tokens."""
    normalization: Literal["global_tokens"] = "global_tokens"
    """Mean over the response tokens of the whole global batch: all ranks, all micro-batches."""
    lens: LensConfig = field(default_factory=LensConfig)
    """The lens term."""
    hidden: HiddenConfig = field(default_factory=HiddenConfig)
    """The hidden-state term."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, the learning rate's course and the length of the run."""

    lr: Positive = 2e-4
    """Peak learning rate."""
    lr_min: Weight = 1e-7
    """Final learning rate of the cosine and linear schedules."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warmup."""
    warmup: Weight = 0.0
    """Linear warmup: optimizer steps if ≥ 1, share of all steps if < 1."""
    weight_decay: Weight = 1e-2
    """Weight decay of matrices; norms and biases are never decayed."""
    clip_grad: Weight = 1.0
    """Largest norm of the gradient over all parameters; 0: no clipping."""
    epochs: Count = 20
    """Passes over the training records."""
    max_steps: Count | None = None
    """Optimizer steps in all; overrides epochs."""
    micro_batch_size: Count = 4
    """Records per process and micro-batch."""
    accumulation: Count = 1
    """Micro-batches per optimizer step."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a model answers prompts."""

    batch_size: Count = 8
    """Records per process and batch, at most."""
    batch_tokens: Count = 16384
    """Tokens per process and batch, at most; each record counts as the longest prompt and the
    longest answer. Too little memory halves it and goes on; answers do not depend on it."""
    do_sample: bool = True
    """Sample; false: greedy."""
    temperature: Positive = 1.0
    """Sampling temperature."""
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Nucleus: smallest set of tokens with this probability."""
    top_k: Whole = 0
    """Keep the k likeliest tokens; 0: all."""
    no_repeat_ngram_size: Whole = 6
    """No n-gram of this size occurs twice; 0: off."""
    max_new_tokens: Count = 256
    """Longest answer in tokens."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig(SamplingConfig):
    """Dev evaluation in training and the final evaluation: one set of settings."""

    every: Count | None = None
    """Optimizer steps between dev evaluations; default: once an epoch and at the end."""
    dev_size: Whole = 1000
    """Records at the head of raw.jsonl that are held out as the dev set."""
    metric: Literal["loss", "rougeL"] = "loss"
    """What chooses best/: token-weighted dev loss, or Rouge-L of generated dev answers."""
    seeds: list[Whole] = field(default_factory=lambda: [10, 20, 30, 40, 50])
    """Sampling seeds; the dev evaluation uses the first."""
    long_prompts: Literal["cut", "drop"] = "cut"
    """Prompts over max_prompt_length. cut: the middle of their input (or instruction) is left out,
    so that "### Response:" stays; drop: they are not scored. Both are counted and told."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingConfig):
    """The teacher's answers to the training prompts; read by `python -m distilllens generate`."""

    samples: Count = 1
    """Answers to each prompt."""
    seed: Whole = 10
    """With a prompt's place in the file it fixes the prompt's random numbers."""
    no_repeat_ngram_size: Whole = 0
    """No n-gram of this size occurs twice, the prompt's own among them; 0: off. Any other number
    keeps answers from quoting that much of their input."""
    keep_truncated: bool = True
    """Keep answers that ended by length. They are trained on without an end-of-text token, as
    they do not end; without them, short answers would be too many."""
    limit: Count | None = None
    """Answer only the first N training prompts; default: all."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """What is logged, how often and where."""

    log_every: Count = 10
    """Optimizer steps between lines of metrics.jsonl and of the screen."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Mirror the metrics to Weights & Biases; it can never stop a run."""
    wandb_project: str = "distilllens"
    """Project name there."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a student: `python train.py --config FILE … --section.key value …`."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    deepspeed: str = "configs/deepspeed/zero2_bf16.json"
    """DeepSpeed file: ZeRO stage, precision, offload. Batch, clipping and
    optimizer come from here."""
    dry_run: bool = False
    """Load configs, tokenizer, first batch, layer pairs; tell steps and memory; train nothing."""
    debug: bool = False
    """Show tracebacks on the screen (they always go to log.txt)."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Score a model on test sets: `python evaluate.py --config FILE … --section.key value …`."""

    checkpoint: str = "results/train/run/best"
    """Folder (or hub name) of the model to score."""
    output_dir: str = "results/eval_main/run"
    """Results go to OUTPUT_DIR/seedN/SET/{results.json,samples.jsonl}."""
    name: str | None = None
    """Method name in reports; default: the training run's name or APPROACH/DIVERGENCE, else the
    checkpoint's folder."""
    data_dir: str = "data"
    """Folder that holds the sets."""
    sets: list[str] = field(
        default_factory=lambda: ["dolly", "self_inst", "vicuna", "sinst", "uinst"]
    )
    """Names of sets: folders of data_dir with a valid.jsonl."""
    limit: Count | Literal["all"] | None = None
    """Use only the first N prompts of each set, or all; default: the protocol's number, which is
    all but for uinst (10,000)."""
    max_prompt_length: Count = 256
    """Longest prompt in tokens; eval.long_prompts says what becomes of longer ones."""
    bad_lines: Literal["error", "skip"] = "error"
    """What a broken record does: stop with file and line, or skip it and count."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision; auto: that of the checkpoint."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation; auto: what transformers chooses."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """What generates; vllm is an extra for GPUs (`bash scripts/setup.sh vllm`): the same settings,
    other samples."""
    trust_remote_code: bool = False
    """Run the Python code that a model folder brings along. Only with a pinned revision."""
    revision: str | None = None
    """Commit hash of the hub repository."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    score_workers: Whole = 1
    """Processes beside each generating one that score answers meanwhile, where there are enough to
    be worth it; 0: none. The results are the same."""
    similarity: str | None = None
    """Folder (or hub name) of a sentence-transformers model: also measure the cosine of answers and
    references, for example sentence-transformers/all-MiniLM-L6-v2. Needs the extra similarity."""
    similarity_revision: str | None = None
    """Commit hash of that model's hub repository. Code of its own is never run."""
    token_metrics: bool = False
    """Also measure loss, accuracy, calibration and entropy on the references' tokens; with a
    teacher, the distance from it."""
    exposure_bias: bool = False
    """Also measure the excess accumulated error against the teacher: both models answer once more,
    sampled at temperature 1 without filters."""
    teacher: str | None = None
    """Folder (or hub name) of the teacher that token_metrics and exposure_bias compare with."""
    teacher_lora: str | None = None
    """Folder of an adapter that is merged into the teacher."""
    teacher_revision: str | None = None
    """Commit hash of the teacher's hub repository."""
    harness: list[str] | str | None = None
    """Tasks of lm-eval, as in arc_easy,hellaswag: run them instead of the sets, in one process,
    with limit and eval.batch_size; results go to OUTPUT_DIR/harness/TASK."""
    harness_path: str | None = None
    """Folder of own tasks (YAML) for harness; functions that they name run as code."""
    harness_fewshot: Whole | None = None
    """Examples before each question of harness; default: the task's own number."""
    overwrite: bool = False
    """Score again what has a results.json already, from the first answer on; default: skip what is
    finished and go on with what is not."""
    dry_run: bool = False
    """Load config, tokenizer and sets, tell counts; generate nothing."""
    debug: bool = False
    """Show tracebacks on the screen."""


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Let a language model grade answers: `python -m distilllens judge A [--against B] …`."""

    answers: str | None = None
    """A, the folder of an evaluation (evaluate.py's output_dir); may stand first without a flag."""
    against: str | None = None
    """B, the folder of another evaluation of the same prompts: each pair of answers is compared in
    both orders. Without it each answer of A gets a score from 1 to 10."""
    base_url: str | None = None
    """Address of an OpenAI-compatible endpoint, as in https://HOST/v1; prompts and answers go
    there."""
    model: str | None = None
    """The judge's name there."""
    api_key_env: str | None = "OPENAI_API_KEY"
    """NAME of the environment variable that holds the key, which is never logged or stored; null:
    the endpoint asks for none."""
    sets: list[str] | None = None
    """Sets to judge; default: all that are finished in A."""
    seeds: list[Whole] | None = None
    """Sampling seeds to judge; default: all that are finished in A."""
    limit: Count | None = None
    """Judge only the first N prompts of each set; default: all."""
    grade_references: bool = True
    """Score each prompt's first reference too, once, and tell the ratio; not with against."""
    temperature: Weight | None = 0.0
    """The judge's sampling temperature; null: not sent, for models that refuse it."""
    max_tokens: Count = 512
    """Longest reply of the judge in tokens."""
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the endpoint calls that limit."""
    asks: Count = 3
    """Times that a question is asked until the reply holds a verdict; then it is unparsed."""
    concurrency: Count = 4
    """Requests under way at a time."""
    timeout: Positive = 60.0
    """Seconds for one request, from its start to the last byte."""
    retries: Whole = 5
    """Further tries after 429, 500 to 599, a time-out or a broken connection."""
    wait: Weight = 1.0
    """Seconds before the first of them, doubled each time, with jitter; Retry-After comes first."""
    max_wait: Weight = 60.0
    """Longest wait in seconds; an endpoint that asks for a longer one is not waited for."""
    input_price: Weight | None = None
    """Price of a million input tokens; with output_price the cost is counted."""
    output_price: Weight | None = None
    """Price of a million output tokens."""
    max_cost: Weight | None = None
    """Stop, with code 75, before this command's requests can cost more; needs both prices. Must
    allow one question."""
    max_requests: Count | None = None
    """Stop, with code 75, after this many requests of this command, tries included."""
    output_dir: str | None = None
    """Default: A/judge/MODEL. Requests are kept there in cache.jsonl and never paid twice."""
    dry_run: bool = False
    """Read and pair the answers, count what is not asked yet; send nothing."""
    debug: bool = False
    """Show tracebacks on the screen."""


def load_config(
    argv: Sequence[str] | None = None, *, prog: str = "python train.py", about: str = ""
) -> TrainConfig:
    """Reads a training configuration: YAML layers deep-merged, then flags.

    Args:
        argv: Arguments without the program's name; default: those of the process.
        prog: How the program is called, for ``--help``: others take a training's options too.
        about: What it does with them; default: it trains.

    Returns:
        The resolved, validated configuration.

    Raises:
        ConfigError: Unknown keys (all at once, with the nearest known name), values of a wrong
            type or range, a file that is missing or not YAML.
    """
    config = parse_arguments(TrainConfig, argv, prog=prog, about=about)
    raise_problems(train_problems(config))
    if config.objective.approach == "seqkd" and config.data.generated is None:
        raise ConfigError(
            "objective.approach=seqkd needs data.generated, the folder of the teacher's answers",
            fix="--data.generated FOLDER; python -m distilllens generate with the same options "
            "makes it",
        )
    return config


def load_evaluate_config(argv: Sequence[str] | None = None) -> EvaluateConfig:
    """Reads an evaluation configuration; the same form and errors as `load_config`."""
    config = parse_arguments(EvaluateConfig, argv, prog="python evaluate.py")
    raise_problems(evaluate_problems(config))
    return config


def load_judge_config(argv: Sequence[str]) -> JudgeConfig:
    """Reads a judge's configuration; a first argument without a flag is ``answers``."""
    if argv and not argv[0].startswith("-"):
        argv = ["--answers", *argv]
    config = parse_arguments(JudgeConfig, argv, prog="python -m distilllens judge")
    raise_problems(judge_problems(config))
    return config


def dump_config(config: Any) -> str:
    """Returns a configuration as YAML; ``--config`` with it gives an equal configuration."""
    return yaml.dump(
        dataclasses.asdict(config), Dumper=_QuotingDumper, sort_keys=False, allow_unicode=True
    )


class _QuotingDumper(yaml.SafeDumper):
    """Quotes texts that a reader could take for numbers: 1e-4, or a commit hash like 1234e56."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        float(text)
    except ValueError:
        return dumper.represent_str(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'")


_QuotingDumper.add_representer(str, _represent_text)


def parse_wall_time(text: str, name: str = "run.max_wall_time") -> float:
    """Converts ``HH:MM:SS``, the value of an option, to seconds.

    Raises:
        ConfigError: Not of that form.
    """
    match = re.fullmatch(r"(\d+):([0-5]?\d):([0-5]?\d)", text)
    if match is None:
        raise ConfigError(f"{name}={text!r} is not HH:MM:SS")
    hours, minutes, seconds = (int(group) for group in match.groups())
    return 3600.0 * hours + 60.0 * minutes + seconds


def clock(seconds: float) -> str:
    """Returns a time as H:MM:SS, the nearest second."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


def train_problems(config: TrainConfig) -> list[str]:
    """Returns the options of a training that are in conflict; ranges stand at the fields."""
    model, data, objective, optim = config.model, config.data, config.objective, config.optim
    lens, hidden, generate = objective.lens, objective.hidden, config.generate
    compares = objective.approach not in CE_ONLY and objective.kd_ratio > 0
    plain_teacher = model.teacher_placement == "device" and model.teacher_quantization == "none"
    rules = {
        f"model.teacher is needed by objective.approach={objective.approach}": (
            not compares or bool(model.teacher)
        ),
        "model.trust_remote_code needs model.revision": (
            not model.trust_remote_code or bool(model.revision)
        ),
        f"model.teacher_placement={model.teacher_placement} needs teacher_quantization=none": (
            model.teacher_placement == "device" or model.teacher_quantization == "none"
        ),
        "model.compile needs model.teacher_placement=device and teacher_quantization=none": (
            not model.compile or plain_teacher
        ),
        f"data.max_prompt_length={data.max_prompt_length} must be < data.max_length="
        f"{data.max_length}": data.max_prompt_length < data.max_length,
        "data.keep_gold needs data.generated": not data.keep_gold or data.generated is not None,
        "objective.lens.rule=every_n needs objective.lens.every": (
            lens.rule != "every_n" or lens.every is not None
        ),
        "objective.lens.teacher_layers and student_layers must be given together": (
            (lens.teacher_layers is None) == (lens.student_layers is None)
        ),
        "objective.lens.depth_weights and weights cannot both be given": (
            lens.depth_weights == "equal" or lens.weights is None
        ),
        f"objective.hidden.coeff={hidden.coeff} needs objective.approach=kd or distill_lens, and "
        "objective.kd_ratio > 0": not hidden.coeff or compares,
        f"optim.lr_min={optim.lr_min} must be ≤ optim.lr={optim.lr}": optim.lr_min <= optim.lr,
        "run.timeout must be > 0": parse_wall_time(config.run.timeout, "run.timeout") > 0,
        "eval.seeds must not be empty": bool(config.eval.seeds),
        f"generate.samples={generate.samples} would all be the same: greedy": (
            generate.do_sample or generate.samples == 1
        ),
    }
    if config.run.max_wall_time is not None:
        parse_wall_time(config.run.max_wall_time)
    return _broken(rules) + name_problems("run.name", config.run.name)


def _broken(rules: Mapping[str, bool]) -> list[str]:
    return [text for text, holds in rules.items() if not holds]


def name_problems(key: str, name: str | None) -> list[str]:
    """Says why a name cannot stand in reports and trackers; it may look like kd/rkl."""
    if name is None or (len(name) <= 200 and name[0] != "/" and ".." not in name.split("/")):
        return []
    return [f"{key}={name!r:.80} must have at most 200 characters, no leading / and no .."]


def evaluate_problems(config: EvaluateConfig) -> list[str]:
    """Returns the options of an evaluation that are in conflict; ranges stand at the fields."""
    sets, seeds = config.sets, config.eval.seeds
    measures = config.token_metrics or config.exposure_bias
    rules = {
        "sets must not be empty": bool(sets),
        f"sets={sets} names a set twice": len(set(sets)) == len(sets),
        "eval.seeds must not be empty": bool(seeds),
        f"eval.seeds={seeds} names a seed twice": len(set(seeds)) == len(seeds),
        "trust_remote_code needs revision": not config.trust_remote_code or bool(config.revision),
        "exposure_bias needs teacher": not config.exposure_bias or bool(config.teacher),
        "teacher is read by token_metrics and exposure_bias: ask for one of them": (
            config.teacher is None or measures
        ),
        "teacher_lora needs teacher": config.teacher_lora is None or bool(config.teacher),
        "teacher_revision needs teacher": config.teacher_revision is None or bool(config.teacher),
        "trust_remote_code with a teacher needs teacher_revision": (
            not config.trust_remote_code or not config.teacher or bool(config.teacher_revision)
        ),
        "teacher and similarity must not be empty": "" not in (config.teacher, config.similarity),
        "similarity_revision needs similarity": (
            config.similarity_revision is None or bool(config.similarity)
        ),
        "harness runs without backend=vllm, similarity, token_metrics and exposure_bias": (
            config.harness is None
            or not (measures or config.similarity or config.backend == "vllm")
        ),
        "harness_path and harness_fewshot need harness": (
            config.harness is not None
            or (config.harness_path is None and config.harness_fewshot is None)
        ),
    }
    return _broken(rules) + name_problems("name", config.name)


def judge_problems(config: JudgeConfig) -> list[str]:
    """Returns the settings of a judge that are missing or in conflict."""
    # The value of a wrong api_key_env is not told: it may be the key itself.
    is_name = config.api_key_env is None or re.fullmatch("[A-Z][A-Z0-9_]*", config.api_key_env)
    rules = {
        "A, the folder of an evaluation, must be given": config.answers is not None,
        "base_url must be the http or https address of an endpoint, without user, password or "
        "query": _is_endpoint(config.base_url),
        "model must be given": config.model is not None,
        "api_key_env must be the NAME of a variable in capital letters, not a key": bool(is_name),
        f"wait={config.wait} must be ≤ max_wait={config.max_wait}": config.wait <= config.max_wait,
        "input_price and output_price must be given together": (
            (config.input_price is None) == (config.output_price is None)
        ),
        "max_cost needs input_price and output_price": (
            config.max_cost is None or config.input_price is not None
        ),
        "sets must not be empty": config.sets != [],
        "seeds must not be empty": config.seeds != [],
    }
    return _broken(rules)


def _is_endpoint(address: str | None) -> bool:
    """Whether it is a plain web address; a password or a key in it would be stored."""
    try:
        url = urlsplit(address or "")
    except ValueError:
        return False
    is_plain = url.username is None and not url.query and not url.fragment
    return url.scheme in ("http", "https") and bool(url.hostname) and is_plain
