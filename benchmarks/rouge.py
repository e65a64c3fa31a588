"""Rouge-L pairs per CPU second: ``python -m benchmarks.rouge --help``.

    rouge-score    ``RougeScorer(["rougeL"], use_stemmer=True)``, the metric's definition
    cold           `distilllens.evaluation.rouge`: words stemmed once each, rapidfuzz's LCS; what it
                   remembers of words and texts is forgotten before each repetition
    warm           the same with the references known, as from the second sampling seed on

Pairs are made of the reference answers of instruction data: each against the next record's, against
one of anywhere, against itself with its end cut off, and against itself with its words in another
order. First the F1 of all pairs is compared, bit for bit; then a part of them is timed, on one
thread: pairs whose answer is the reference of none, as a model's answers are new.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rouge_score.rouge_scorer import RougeScorer

from benchmarks.harness import (
    Baseline,
    Parser,
    Variant,
    add_common_options,
    append_csv,
    environment,
    measure,
    positive_int,
    prepare_process,
    print_results,
    result_rows,
    run_command,
)
from distilllens.data.progress import track
from distilllens.data.records import read_records
from distilllens.errors import DataError, NumericsError
from distilllens.evaluation.rouge import forget_texts, rouge_l

BASELINES = (
    Baseline(column="oracle_over_this", title="× faster", default="rouge-score", speedup=True),
)
Pair = tuple[str, str]
"""An answer and a reference."""


def make_pairs(texts: Sequence[str], *, limit: int | None, seed: int) -> list[Pair]:
    """Returns four pairs of each text, in random order, the first ``limit`` of them."""
    rng = random.Random(seed)
    pairs: list[Pair] = []
    for number, text in enumerate(texts):
        words = text.split()
        shuffled = rng.sample(words, len(words))
        pairs += [
            (texts[(number + 1) % len(texts)], text),
            (rng.choice(texts), text),
            (text[: rng.randrange(len(text) + 1)], text),
            (" ".join(shuffled), text),
        ]
    rng.shuffle(pairs)
    return pairs[:limit]


def with_new_answers(pairs: Sequence[Pair], limit: int) -> list[Pair]:
    """Returns the first ``limit`` pairs that leave every answer unknown to who knows references."""
    chosen: list[Pair] = []
    answers: set[str] = set()
    references: set[str] = set()
    for answer, reference in pairs:
        if answer == reference or answer in references or reference in answers:
            continue
        chosen.append((answer, reference))
        answers.add(answer)
        references.add(reference)
        if len(chosen) == limit:
            break
    return chosen


def read_texts(files: Sequence[Path], max_chars: int) -> list[str]:
    """Returns all reference answers of the files, each at most ``max_chars`` long.

    Raises:
        DataError: A file is broken or missing.
    """
    return [
        text[:max_chars]
        for file in files
        for record in read_records(file, references="many").records
        for text in record.outputs
    ]


def check_equal(pairs: Sequence[Pair], oracle: Callable[[Pair], float], console: Console) -> None:
    """Compares both on all pairs.

    Raises:
        NumericsError: They differ; names the first pair.
    """
    with track("comparing", "pairs", total=len(pairs), console=console) as advance:
        for pair in pairs:
            ours, theirs = rouge_l(*pair), oracle(pair)
            if ours != theirs:
                raise NumericsError(
                    f"{ours!r} is not rouge-score's {theirs!r}", why=f"{pair!r:.300}"
                )
            advance(1)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = Parser(
        prog="python -m benchmarks.rouge",
        description="Rouge-L pairs per CPU second against rouge-score, and equality on all pairs.",
    )
    add = parser.add_argument
    add("--data", type=Path, nargs="+", required=True, help="JSONL files with instruction, output")
    add("--pairs", type=positive_int, default=12_000, help="that are compared; four of each text")
    add("--timed", type=positive_int, default=1_000, help="so many with new answers are timed")
    add("--max_chars", type=positive_int, default=2_000, help="of a text; rouge-score is quadratic")
    add_common_options(parser, rounds=3, warmup=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command.

    Raises:
        ConfigError: Wrong usage, a CSV file of another benchmark.
        DataError: Broken or missing data.
        NumericsError: A pair with another F1 than rouge-score's.
        StorageError: The CSV file cannot be written.
    """
    arguments = parse(argv)
    device = prepare_process(arguments)
    console = Console()
    machine = environment(device)
    texts = read_texts(arguments.data, arguments.max_chars)
    if not any(texts):
        raise DataError("all reference answers are empty")
    pairs = make_pairs(texts, limit=arguments.pairs, seed=arguments.seed)
    timed = with_new_answers(pairs, arguments.timed)
    if not timed:
        raise DataError("every answer is a reference too: too few texts to time any pair")
    scorer = RougeScorer(["rougeL"], use_stemmer=True)

    def oracle(pair: Pair) -> float:
        answer, reference = pair
        return float(scorer.score(reference, answer)["rougeL"].fmeasure)

    begin = time.process_time()
    check_equal(pairs, oracle, console)
    console.print(
        f"{len(pairs):,} pairs of {len(texts):,} texts: F1 equal in every bit "
        f"({time.process_time() - begin:,.0f} CPU s)",
        highlight=False,
    )

    def know_references() -> None:
        forget_texts()
        for _, reference in timed:
            rouge_l(reference, reference)

    def score_timed() -> None:
        for pair in timed:
            rouge_l(*pair)

    def score_timed_by_oracle() -> None:
        for pair in timed:
            oracle(pair)

    variants = [
        Variant(name="rouge-score", run=score_timed_by_oracle),
        Variant(name="cold", run=score_timed, setup=forget_texts),
        Variant(name="warm", run=score_timed, setup=know_references),
    ]
    results = measure(
        variants, rounds=arguments.rounds, warmup=arguments.warmup, device=device, console=console
    )
    speed = {result.name: len(timed) / result.cpu_s for result in results}
    print_results(
        console,
        results,
        title=f"{len(timed):,} pairs timed",
        baselines=BASELINES,
        more={"pairs / CPU s": speed},
    )
    if arguments.csv is not None:
        parameters = {
            **machine,
            "benchmark": "rouge",
            "texts": len(texts),
            "equal_pairs": len(pairs),
            "timed_pairs": len(timed),
            **{
                name: getattr(arguments, name) for name in ("max_chars", "seed", "warmup", "rounds")
            },
        }
        more = {"pairs_per_cpu_s": speed}
        rows = result_rows(results, parameters=parameters, baselines=BASELINES, more=more)
        append_csv(arguments.csv, rows)


if __name__ == "__main__":
    run_command(main)
