"""Tokens per second of generation: ``python -m benchmarks.generation --help``.

    distilllens    `distilllens.evaluation.generation`: prompts sorted by length, ended rows leave
                   the batch and waiting prompts join it, --batch_size rows at most, every example
                   with its own random numbers
    plain          ``model.generate`` over batches in the file's order, every prompt padded to
                   --max_prompt_length, one random state for all

Both sample by the same settings, so their answers differ but come from one distribution; lengths,
and with them the work, differ a little too. Tokens per second is the figure to compare: tokens of
answers, without the end-of-text token and what stands behind it, per second of wall time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.harness import (
    DTYPES,
    Baseline,
    Parser,
    Variant,
    add_common_options,
    append_csv,
    environment,
    measure,
    natural_int,
    positive_int,
    prepare_process,
    print_results,
    result_rows,
    run_command,
)
from distilllens.config import EvalConfig
from distilllens.data.records import read_records
from distilllens.data.tokenize import encode_prompts
from distilllens.evaluation.cells.plan import drop_long_prompts, no_usable_prompt
from distilllens.evaluation.generation import check_context_window, cut_at_eos, generate_answers
from distilllens.models import load_model, load_tokenizer

BASELINES = (Baseline(column="plain_over_this", title="× faster", default="plain", speedup=True),)


def plain_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    settings: EvalConfig,
    seed: int,
    padded_length: int,
) -> list[list[int]]:
    """Generates as a simple script does: fixed padding, fixed batches, one random state.

    Args:
        model: A causal language model, on the device to use.
        tokenizer: Its tokenizer, with an end-of-text token.
        prompts: Complete prompts, none longer than ``padded_length`` tokens.
        settings: Sampling, n-gram rule, length and batch size.
        seed: Of PyTorch's global random state.
        padded_length: Tokens to which every prompt is padded, on the left.

    Returns:
        The token ids of each answer, cut at the end-of-text token, in the prompts' order.
    """
    eos_id = tokenizer.eos_token_id
    torch.manual_seed(seed)
    generate: Any = model.generate
    answers = []
    for start in range(0, len(prompts), settings.batch_size):
        prompt_ids = encode_prompts(tokenizer, prompts[start : start + settings.batch_size])
        gaps = [padded_length - len(ids) for ids in prompt_ids]
        padded = [[eos_id] * gap + list(ids) for gap, ids in zip(gaps, prompt_ids, strict=True)]
        mask = [[0] * gap + [1] * (padded_length - gap) for gap in gaps]
        output_BT = generate(
            input_ids=torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=GenerationConfig(
                max_new_tokens=settings.max_new_tokens,
                do_sample=settings.do_sample,
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k,
                no_repeat_ngram_size=settings.no_repeat_ngram_size,
                eos_token_id=eos_id,
                pad_token_id=eos_id,
            ),
        )
        answers += [cut_at_eos(ids, eos_id)[0] for ids in output_BT[:, padded_length:].tolist()]
    return answers


def build_variants(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    arguments: argparse.Namespace,
) -> tuple[list[Variant], dict[str, float]]:
    """Returns the two variants, and a table that each fills with its number of tokens."""
    settings = EvalConfig(
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        no_repeat_ngram_size=arguments.no_repeat_ngram_size,
    )
    limit, seed = arguments.max_prompt_length, arguments.seed
    tokens: dict[str, float] = {}

    def run_ours() -> None:
        answers = generate_answers(
            model, tokenizer, prompts, settings=settings, seed=seed, max_prompt_length=limit
        )
        tokens["distilllens"] = sum(answer.num_tokens for answer in answers)

    def run_plain() -> None:
        answers = plain_answers(
            model, tokenizer, prompts, settings=settings, seed=seed, padded_length=limit
        )
        tokens["plain"] = sum(len(ids) for ids in answers)

    runs: dict[str, Callable[[], None]] = {"plain": run_plain, "distilllens": run_ours}
    return [Variant(name=name, run=run) for name, run in runs.items()], tokens


def load_prompts(
    arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, console: Console
) -> list[str]:
    """Reads the first prompts that are within the limit.

    Raises:
        DataError: Broken or missing file, or no usable prompt.
    """
    records = read_records(arguments.prompts, references="many").records
    fitting, _ = drop_long_prompts(tokenizer, records, arguments.max_prompt_length)
    if not fitting:
        raise no_usable_prompt(arguments.prompts, len(records), arguments.max_prompt_length)
    prompts = [record.prompt for record in fitting[: arguments.limit]]
    console.print(
        f"{len(prompts):,} prompts of {len(records):,} records, "
        f"{len(records) - len(fitting):,} over {arguments.max_prompt_length} tokens left out",
        highlight=False,
    )
    return prompts


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = Parser(
        prog="python -m benchmarks.generation",
        description="Tokens per second of generation, against a plain loop.",
    )
    defaults = EvalConfig()
    add = parser.add_argument
    add("--model", required=True, help="model folder (or hub name)")
    add("--prompts", required=True, help="JSONL file with instruction, input, output")
    add("--limit", type=positive_int, default=32, help="prompts: the first so many that fit")
    add("--max_prompt_length", type=positive_int, default=256, help="tokens; plain pads to it")
    add("--max_new_tokens", type=positive_int, default=256, help="longest answer in tokens")
    add("--batch_size", type=positive_int, default=8, help="prompts per batch")
    add("--temperature", type=float, default=defaults.temperature, help="of the sampling")
    add("--top_p", type=float, default=defaults.top_p, help="nucleus, in (0, 1]")
    add("--top_k", type=natural_int, default=defaults.top_k, help="likeliest tokens; 0: all")
    add(
        "--no_repeat_ngram_size",
        type=natural_int,
        default=defaults.no_repeat_ngram_size,
        help="no n-gram of this size twice; 0: off",
    )
    add_common_options(parser, rounds=3, warmup=1)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command.

    Raises:
        ConfigError: Wrong usage, a missing or unusable model, a CSV file of another benchmark.
        DataError: Broken or missing prompts.
        StorageError: The CSV file cannot be written.
    """
    arguments = parse(argv)
    device = prepare_process(arguments)
    console = Console()
    machine = environment(device)
    console.print(f"loading {arguments.model}", highlight=False, soft_wrap=True)
    tokenizer = load_tokenizer(arguments.model)
    model = load_model(arguments.model, dtype=DTYPES[arguments.dtype])
    check_context_window(model.config, arguments.max_prompt_length, arguments.max_new_tokens)
    model.to(device)  # type: ignore[arg-type]
    prompts = load_prompts(arguments, tokenizer, console)
    variants, tokens = build_variants(model, tokenizer, prompts, arguments)
    results = measure(
        variants, rounds=arguments.rounds, warmup=arguments.warmup, device=device, console=console
    )
    speed = {result.name: tokens[result.name] / result.wall_s for result in results}
    print_results(
        console,
        results,
        title=f"{len(prompts):,} answers, {arguments.dtype}, batch {arguments.batch_size}",
        baselines=BASELINES,
        more={"tokens": tokens, "tokens/s": speed},
    )
    if arguments.csv is not None:
        options = "model dtype limit max_prompt_length max_new_tokens batch_size temperature top_p"
        names = [*options.split(), "top_k", "no_repeat_ngram_size", "seed", "warmup", "rounds"]
        parameters = {
            **machine,
            "benchmark": "generation",
            **{name: getattr(arguments, name) for name in names},
            "prompts": len(prompts),
        }
        more = {"tokens": tokens, "tokens_per_s": speed}
        rows = result_rows(results, parameters=parameters, baselines=BASELINES, more=more)
        append_csv(arguments.csv, rows)


if __name__ == "__main__":
    run_command(main)
