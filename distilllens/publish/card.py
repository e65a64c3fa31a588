"""The model card: README.md of an exported model.

A card is a pure function of the facts beside the weights (`card_facts`) and of the evaluations that
are there: no clock, no machine. What nobody has recorded is called unknown, never guessed.
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from numerize.numerize import numerize

from distilllens.config import CE_ONLY, EvalConfig, EvaluateConfig
from distilllens.data.prompts import alpaca_prompt
from distilllens.publish.card_facts import CardFacts, ModelFacts, count_parameters, write_facts
from distilllens.publish.card_scores import CardScore, Settings
from distilllens.report.scores.metrics import metric_of
from distilllens.runs import redact, replace_text

CARD = "README.md"
UNKNOWN = "unknown: check before you publish"
HUB_TYPES = {"rougeL": "rouge"}
"""Key of results.json → type on the hub, where that has another name for it."""

logger = logging.getLogger("distilllens")


def write_card(folder: Path, facts: CardFacts, scores: Sequence[CardScore] = ()) -> None:
    """Writes README.md and the facts that it is made of into a model's folder.

    Raises:
        OSError: They cannot be written.
    """
    write_facts(folder, facts)
    replace_text(folder / CARD, redact(str(build_card(folder, facts, scores))))


def maybe_write_card(folder: Path, write: Callable[[], object]) -> None:
    """Writes a card; a failure is only told: a card must never cost a model.

    Args:
        folder: Of the model.
        write: Does it.
    """
    try:
        write()
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        logger.warning(
            "the model card in %s could not be written: %s; the model is not affected, and "
            "python -m distilllens card makes the card later",
            *(folder, reason),
        )


def build_card(folder: Path, facts: CardFacts, scores: Sequence[CardScore]) -> ModelCard:
    """Returns the card of the model in a folder, whose weights it counts."""
    licence, reason = own_licence(facts)
    title = _title(facts)
    base = facts.student.name if facts.student.is_hub_name else None
    front = ModelCardData(
        base_model=facts.said.base_model or base,
        datasets=list(facts.said.datasets) or None,
        language=list(facts.said.language) or None,
        library_name="transformers",
        license=licence or "unknown",
        pipeline_tag="text-generation",
        tags=_tags(facts),
        model_name=title if scores else None,
        eval_results=[_eval_result(score) for score in scores] or None,
    )
    sections = [
        f"# {title}\n\n{_summary(facts)}",
        f"## Models\n\n{_models(facts, count_parameters(folder))}",
        f"## Method\n\n{_method(facts)}",
        f"## Data\n\n{_data(facts)}",
        f"## Training\n\n{_training(facts)}",
        f"## Scores\n\n{_scores(facts, scores)}",
        f"## Use\n\n{_use(facts)}",
        f"## Reproduce\n\n{_reproduce(facts, scores)}",
        f"## Licences\n\n{_licences(facts, licence, reason)}",
    ]
    return ModelCard(f"---\n{front.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def own_licence(facts: CardFacts) -> tuple[str | None, str]:
    """Returns the licence of the trained model, None where nobody knows; and why.

    It is known without the publisher's word only if all that the model was made of, the data too,
    is known to have the same one: terms differ in what they pass on, and that is nothing to guess.
    """
    if facts.said.licence:
        return facts.said.licence, "given by the publisher"
    licences = {licence for _, licence, _ in _origins(facts)}
    if None in licences:
        return None, "not all that the model was made of tells its own"
    if len(licences) > 1:
        return None, "what the model was made of has different ones"
    return facts.student.licence, "that of all that the model was made of"


def _origins(facts: CardFacts) -> list[tuple[str, str | None, str]]:
    """Returns what the model was made of: its role, its licence, and what says so."""
    student, teacher, data = facts.student, facts.teacher, facts.data
    origins = [("student, before", student.licence, student.licence_source)]
    if teacher is not None:
        origins.append(("teacher", teacher.licence, teacher.licence_source))
        if facts.options["model"]["teacher_lora"] is not None:
            adapter = (facts.adapter_licence, facts.adapter_licence_source)
            origins.append(("teacher's adapter", *adapter))
    return [*origins, ("data", data.licence, data.licence_source)]


# --- Sections -----------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _known(value: object) -> str:
    return "unknown" if value is None else str(value)


def _short(name: str) -> str:
    """Returns what a reader calls a model: its folder, or of a run's best/ the run."""
    parts = name.split("/")
    if parts[-1] in ("best", "latest") and len(parts) > 1:
        return "/".join(part for part in parts[:-1] if part not in ("results", "train"))
    return parts[-1]


def _title(facts: CardFacts) -> str:
    objective = facts.options["objective"]
    approach = objective["approach"]
    if approach == "sft":
        return f"{_short(facts.student.name)}, fine-tuned (sft)"
    teacher = "" if facts.teacher is None else f" taught by {_short(facts.teacher.name)}"
    kind = "" if approach in CE_ONLY else f", {objective['divergence']}"
    return f"{_short(facts.student.name)}{teacher} ({approach}{kind})"


def _tags(facts: CardFacts) -> list[str]:
    approach = facts.options["objective"]["approach"]
    return [
        "distilllens",
        *(["knowledge-distillation"] if approach != "sft" else []),
        *(["logit-lens"] if approach == "distill_lens" else []),
    ]


def _summary(facts: CardFacts) -> str:
    step = "" if facts.step is None else f" This is the model of optimizer step {facts.step:,}."
    return (
        "A causal language model that answers single instructions, trained with DistillLens "
        f"(distillation through the logit lens, arXiv 2602.13567).{step}"
    )


def _models(facts: CardFacts, num_parameters: int | None) -> str:
    def row(role: str, model: ModelFacts) -> list[str]:
        size = None if model.num_parameters is None else numerize(model.num_parameters)
        values = (model.architecture, model.num_blocks, size, model.fingerprint)
        return [role, f"`{model.name}`", *map(_known, values), model.licence or UNKNOWN]

    rows = [row("student, before", facts.student)]
    if facts.teacher is not None:
        rows.append(row("teacher", facts.teacher))
    size = "" if num_parameters is None else f"\n\nThis model: {num_parameters:,} parameters."
    lora = facts.options["model"]["teacher_lora"]
    adapter = "" if lora is None else f"\n\nInto the teacher the adapter `{lora}` was merged."
    header = ["", "name", "architecture", "blocks", "parameters", "fingerprint", "licence"]
    return _table(header, rows) + size + adapter


METHODS = {
    "sft": "Cross entropy on the records' answers; no teacher.",
    "seqkd": "Cross entropy on answers that the teacher generated (sequence-level distillation).",
    "kd": "A divergence between the final distributions of teacher and student, on the tokens of "
    "the answers.",
    "distill_lens": "A divergence between the final distributions of teacher and student and, with "
    "weight λ, a divergence between what paired middle layers would say: their hidden states "
    "through the model's own final norm and LM head. On the tokens of the answers.",
}


def _method(facts: CardFacts) -> str:
    objective = facts.options["objective"]
    lens, hidden, approach = objective["lens"], objective["hidden"], objective["approach"]
    rows: list[list[str]] = [["approach", f"`{approach}`"]]
    if approach not in CE_ONLY:
        rows += [
            ["divergence of the final layer", f"`{objective['divergence']}`"],
            ["kd_ratio ρ", str(objective["kd_ratio"])],
            ["temperature", str(objective["temperature"])],
        ]
        if objective["top_k"] is not None:
            rows.append(["top_k", str(objective["top_k"])])
    if approach == "distill_lens":
        rows += [
            ["lens weight λ", f"{lens['coeff']} ({lens['schedule']})"],
            ["lens divergence", f"`{lens['divergence']}`, β {lens['beta']}"],
            ["lens norm", lens["norm"]],
            ["pairs by rule", lens["rule"]],
            ["weights of the pairs", str(lens["weights"] or lens["depth_weights"])],
        ]
    if hidden["coeff"]:
        rows.append(["hidden states", f"weight {hidden['coeff']}, `{hidden['loss']}`"])
    if facts.pairs:
        for side, name in ((0, "teacher blocks"), (1, "student blocks")):
            rows.append([name, " ".join(str(pair[side]) for pair in facts.pairs)])
    return f"{METHODS[approach]}\n\n{_table(['', ''], rows)}"


def _data(facts: CardFacts) -> str:
    data, options = facts.data, facts.options["data"]

    def count(number: int | None) -> str:
        return "unknown" if number is None else f"{number:,}"

    is_part = data.num_train != data.num_there
    first = f"{count(data.num_train)}{f', the first of {count(data.num_there)}' if is_part else ''}"
    rows = [
        ["file", f"`{data.file}`"],
        ["training records", first],
        ["dev records", count(data.num_dev)],
        *([] if is_part else [["response tokens to train on", count(data.num_tokens)]]),
        ["longest prompt, longest record", f"{options['max_prompt_length']}, "
         f"{options['max_length']} tokens"],
        ["fingerprint", f"`{_known(data.fingerprint)}`"],
        ["licence", data.licence or UNKNOWN],
    ]  # fmt: skip
    if options["generated"] is not None:
        rows.insert(1, ["answers", f"of the teacher, `{options['generated']}`"])
    return _table(["", ""], rows)


def _training(facts: CardFacts) -> str:
    optim, run = facts.options["optim"], facts.options["run"]
    per_step = optim["micro_batch_size"] * optim["accumulation"] * facts.world_size
    done = None
    if facts.step is not None and facts.steps_per_epoch:
        done = f"{facts.step / facts.steps_per_epoch:.2f}"
    versions = ", ".join(f"{name} {version}" for name, version in sorted(facts.versions.items()))
    lora = facts.options["model"]["student_lora"]
    adapter = "all weights" if lora is None else f"LoRA r {lora['r']}, α {lora['alpha']}, merged"
    rows = [
        ["optimizer steps", f"{_known(facts.step)} of {_known(facts.total_steps)}"],
        ["epochs at this step", _known(done)],
        ["global batch", f"{per_step} records: {optim['micro_batch_size']} × "
         f"{optim['accumulation']} accumulated × {facts.world_size} processes"],
        ["trained", adapter],
        ["optimizer", f"AdamW, weight decay {optim['weight_decay']}, "
         f"clipping {optim['clip_grad']}"],
        ["learning rate", f"{optim['schedule']} from {optim['lr']} to {optim['lr_min']}, "
         f"warmup {optim['warmup']}"],
        ["precision", _known(facts.precision)],
        ["DeepSpeed", f"ZeRO stage {_known(facts.zero_stage)}"],
        ["seed", str(run["seed"])],
        ["git commit of DistillLens", f"`{facts.git_commit}`"],
        ["versions", versions or "unknown"],
    ]  # fmt: skip
    return _table(["", ""], rows)


def _scores(facts: CardFacts, scores: Sequence[CardScore]) -> str:
    parts = []
    if facts.dev:
        figures = {name.removeprefix("eval/dev/"): value for name, value in facts.dev.items()}
        dev = [[metric_of(n).title, f"{v:.6g}"] for n, v in figures.items() if n != "num"]
        count = facts.data.num_dev
        heading = f"On the dev set ({_known(count)} records), at step {_known(facts.step)}:"
        parts.append(f"{heading}\n\n{_table(['dev metric', 'value'], dev)}")
    for settings in dict.fromkeys(score.settings for score in scores):
        rows = [
            [
                s.test_set,
                metric_of(s.metric).title,
                f"{s.mean:.2f}" if s.sd is None else f"{s.mean:.2f} ± {s.sd:.2f}",
                str(s.n),
                str(s.num_prompts),
            ]
            for s in scores
            if s.settings == settings
        ]
        header = ["set", "metric", "mean ± sd", "n", "prompts"]
        how = ", ".join(f"{name} {value}" for name, value in settings)
        parts.append(f"{_table(header, rows)}\n\nAnswers: {how}.")
    if scores:
        parts.append(
            "± is the sample standard deviation over n sampling seeds of this one model: it tells "
            "nothing of other training seeds. What is measured without sampling has n = 1."
        )
    return "\n\n".join(parts) or "No evaluation of these weights was found."


def _use(facts: CardFacts) -> str:
    prompt = alpaca_prompt("Name three colours.")
    code = (
        "from transformers import pipeline\n\n"
        'generate = pipeline("text-generation", model="MODEL_FOLDER_OR_HUB_NAME")\n'
    )
    if facts.chat == "template":
        code += (
            'messages = [{"role": "user", "content": "Name three colours."}]\n'
            'print(generate(messages)[0]["generated_text"][-1]["content"])\n'
        )
    else:
        code += (
            f"prompt = {prompt!r}\n"
            'print(generate(prompt, return_full_text=False)[0]["generated_text"])\n'
        )
    return f"```python\n{code}```\n\n{USES[facts.chat]} The prompt:\n\n```\n{prompt}```"


DEFAULTS = (
    "`generation_config.json` is greedy, ends at the end-of-text token, and has the n-gram rule "
    "and the length of the dev evaluation."
)
USES = {
    "template": "The chat template makes exactly the prompt of training (Alpaca) and replaces any "
    "that the base model had, as this model was not trained on that one. A system message before "
    "the user's is the instruction, the user's then its input. More turns are refused: the model "
    f"never saw any. {DEFAULTS}",
    "text only": "There is no chat template: through one, this tokenizer would not give the tokens "
    f"of training. Give the prompt as a text. {DEFAULTS}",
    "not written": "Chat template and generation settings are whatever the base model had, and the "
    "model was not trained on that template. Give the prompt as a text, and settings with it.",
}


def _reproduce(facts: CardFacts, scores: Sequence[CardScore]) -> str:
    start = "python"
    if facts.world_size > 1:
        start = f"torchrun --nproc_per_node {facts.world_size}"
    train = f"{start} {shlex.join(facts.command)}" if facts.command else "unknown"
    options = yaml.safe_dump(facts.options, sort_keys=False, allow_unicode=True)
    lines = [
        f"{train} --run.output_dir results/train/again",
        *_evaluations(scores),
        "python -m distilllens report results/train/again",
    ]
    return (
        "```bash\n" + "\n".join(lines) + "\n```\n\n<details><summary>All options</summary>\n\n"
        f"```yaml\n{options}```\n\n</details>"
    )


EVALUATE = (
    "python evaluate.py --checkpoint results/train/again/best --output_dir results/eval_main/again"
)


def _evaluations(scores: Sequence[CardScore]) -> list[str]:
    """Returns the commands that score a model as the card's scores were made."""
    if not scores:
        return [f"{EVALUATE} --config configs/eval/paper.yaml"]
    commands = []
    for settings, options in dict.fromkeys((s.settings, s.options) for s in scores):
        sets = {s.test_set for s in scores if (s.settings, s.options) == (settings, options)}
        words = ["--sets", f"[{', '.join(sorted(sets))}]"]
        for name, text in (*_as_options(settings), *options):
            value = json.loads(text)
            words += [f"--{name}", value if isinstance(value, str) else text]
        commands.append(f"{EVALUATE} {shlex.join(words)}")
    return commands


def _as_options(settings: Settings) -> list[tuple[str, str]]:
    """Returns those settings that are options of evaluate.py, by their full names."""
    of_eval = {field.name for field in fields(EvalConfig)}
    of_command = {field.name for field in fields(EvaluateConfig)}
    return [
        *((f"eval.{name}", value) for name, value in settings if name in of_eval),
        *((name, value) for name, value in settings if name in of_command),
    ]


def _licences(facts: CardFacts, licence: str | None, reason: str) -> str:
    rows = [["this model", licence or UNKNOWN, reason]]
    for role, known, source in _origins(facts):
        rows.append([role, known or UNKNOWN, source or "nothing found in its folder"])
    return _table(["", "licence", "as found in"], rows)


def _eval_result(score: CardScore) -> EvalResult:
    numbers: dict[str, Any] = {"n": score.n, "prompts": score.num_prompts}
    numbers |= {} if score.sd is None else {"sd": score.sd}
    numbers |= {setting: json.loads(value) for setting, value in score.settings}
    return EvalResult(
        task_type="text-generation",
        task_name="Text generation",
        dataset_type=score.test_set,
        dataset_name=score.test_set,
        metric_type=HUB_TYPES.get(score.metric, score.metric),
        metric_name=metric_of(score.metric).title,
        metric_value=score.mean,
        metric_args=numbers,
    )
