"""`python -m distilllens judge` against an endpoint on loopback whose rule is known."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from judge_server import Action, Server, longer_wins, running, texts
from scipy.stats import binomtest  # type: ignore[import-untyped]
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import evaluate
from distilllens.__main__ import main
from distilllens.report.scores.load import collect_scores

KEY = "test-key-0123456789abcdef"
WORDS = {"A": ["aaaa", "aaaaaa", "aa", "aaa"], "B": ["bb", "bbb", "bbbbb", "bbb"]}
"""Of four prompts A's answer is longer in two, shorter in one, as long in one."""


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def place(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., int]]:
    """A working folder with evaluations A and B; yields a function that judges there."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    for name, answers in WORDS.items():
        write_cell(name, answers)
    with running(server) as address:
        options = ["--base_url", address, "--model", "org/stub", "--api_key_env", "JUDGE_KEY"]
        quick = ["--wait", "0.01", "--max_wait", "0.5", "--timeout", "5", "--concurrency", "1"]

        def judge(*arguments: str, answers: str = "A") -> int:
            return main(["judge", answers, *options, *quick, *arguments])

        yield judge


def write_cell(root: str, answers: list[str], *, name: str = "words", seed: int = 10) -> None:
    folder = Path(root, f"seed{seed}", name)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(
            {"index": i, "prompt": f"Prompt {i}.", "references": ["r" * 5], "answer": answer}
        )
        for i, answer in enumerate(answers)
    ]
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "results.json").write_text('{"metrics": {}}')


def results(task: str = "against-B-*", root: str = "A") -> dict[str, Any]:
    (file,) = Path(root, "judge/org-stub").glob(f"{task}/results.json")
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def pairs(name: str = "words") -> dict[str, Any]:
    figures: dict[str, Any] = results()["summary"][name]
    return figures


def test_the_longer_answer_wins(
    place: Callable[..., int], server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place("--against", "B") == 0
    assert server.count == 8  # four prompts, both orders
    shown = [texts(request["messages"]) for request in server.requests]
    assert shown[0] == {"prompt": "Prompt 0.", "first-answer": "aaaa", "second-answer": "bb"}
    assert shown[1] == {"prompt": "Prompt 0.", "first-answer": "bb", "second-answer": "aaaa"}
    assert server.requests[0]["temperature"] == 0.0
    assert server.requests[0]["max_tokens"] == 512
    assert server.requests[0]["model"] == "org/stub"
    figures = pairs()
    assert (figures["wins"], figures["ties"], figures["losses"]) == (2, 1, 1)
    assert (figures["n"], figures["unparsed"], figures["unanswered"]) == (4, 0, 0)
    wanted = binomtest(2, 4).proportion_ci(method="wilson")
    assert figures["win_rate"] == 0.5
    assert figures["win_rate_interval"] == pytest.approx([wanted.low, wanted.high])
    assert figures["always_first"] == figures["always_second"] == 0
    found = results()
    assert found["complete"] is True
    assert found["replied_as"] == {"stub-1": 8}
    assert found["replies"]["input_tokens"] == 800
    assert found["replies"]["cost"] is None
    (folder,) = Path("A/judge/org-stub").glob("against-B-*")
    lines = [json.loads(line) for line in (folder / "verdicts.jsonl").read_text().splitlines()]
    assert [line["outcome"] for line in lines] == ["win", "win", "loss", "tie"]
    table = (folder / "table.md").read_text()
    assert "| words | 4 | 4 | 50.0 [15.0, 85.0] | 25.0 | 25.0 [4.6, 69.9] |" in table
    assert "50.0 [15.0, 85.0]" in capsys.readouterr().out

    assert place("--against", "B") == 0
    assert server.count == 8  # the cache knows them all
    assert results()["summary"] == found["summary"]
    assert results()["this_command"]["requests"] == 0


def test_a_judge_with_a_position_gives_no_wins(place: Callable[..., int], server: Server) -> None:
    server.rule = lambda messages: Action(text='{"better": "first"}')
    assert place("--against", "B") == 0
    figures = pairs()
    assert (figures["wins"], figures["ties"], figures["losses"]) == (0, 4, 0)
    assert (figures["always_first"], figures["always_second"]) == (1.0, 0.0)


def test_scores_and_the_ratio_to_the_references(place: Callable[..., int], server: Server) -> None:
    """Lengths 4, 6, 2, 3 and, with seed 20, 4, 4, 2, 3; each reference has 5, and is asked once."""
    write_cell("A", ["aaaa", "aaax", "aa", "aaa"], seed=20)
    write_cell("A", ["aaaaaaa"], name="other", seed=10)
    write_cell("A", ["aaaaaaaaa"], name="other", seed=20)
    assert place() == 0
    assert server.count == (4 + 1) + 4 + (2 + 1) - 1  # "Prompt 0." has the same reference in both
    summary = results("score")["summary"]
    assert summary["words"]["n"] == 8
    assert summary["words"]["num_prompts"] == 4
    assert summary["words"]["score"] == pytest.approx((4 + 5 + 2 + 3) / 4)
    assert summary["words"]["ratio"] == pytest.approx((4 + 5 + 2 + 3) / 20)
    assert summary["other"]["score"] == 8.0
    assert summary["all"]["score"] == pytest.approx((4 + 5 + 2 + 3 + 8) / 5)
    low, high = summary["words"]["score_interval"]
    assert low < 3.5 < high

    before = server.count
    assert place("--sets", "[words]", "--seeds", "[20]", "--grade_references", "false") == 0
    assert server.count == before
    assert "ratio" not in results("score")["summary"]["words"]
    assert results("score")["summary"]["words"]["score"] == pytest.approx((4 + 4 + 2 + 3) / 4)


def test_it_gets_through_whatever_passes(place: Callable[..., int], server: Server) -> None:
    garbage = [Action(text="Nice!"), Action(body=b"<html>"), Action(body=b'{"choices": []}')]
    server.script = [
        Action(status=429, headers={"Retry-After": "0.4"}),
        *(Action(status=500), Action(status=503, body=b"busy"), Action(reset=True)),
        *garbage[:2],
        longer_wins([{"content": server_question(0)}]),
        garbage[2],
        Action(sleep=0.6),
        Action(body=b'{"choices": [{"message": {"content": "x"}}]}' + b" " * 30, drip=0.02),
    ]
    assert place("--against", "B", "--timeout", "0.3") == 0
    assert server.times[1] - server.times[0] >= 0.4
    assert server.times[2] - server.times[1] < 0.3
    figures = pairs()
    assert (figures["wins"], figures["ties"], figures["losses"]) == (2, 1, 1)
    assert server.count == 8 + 4 + 2 + 1 + 2
    assert results()["replies"]["unreadable"] == 3
    assert results()["this_command"]["no_reply"] == []


def server_question(index: int) -> str:
    """Returns the blocks of a question, A first, as the server reads them."""
    answers = {"first-answer": WORDS["A"][index], "second-answer": WORDS["B"][index]}
    tag = "0" * 12
    return "\n".join(f"<{name}-{tag}>\n{text}\n</{name}-{tag}>" for name, text in answers.items())


@pytest.mark.parametrize(
    "action",
    [
        Action(text="Both are nice."),
        Action(text=""),
        Action(text='{"better": "A"}'),
        Action(text='{"better": "first", "better": "second"}'),
        Action(body=b"not json"),
        Action(body=b'{"choices": [{"message": null}]}'),
    ],
)
def test_garbage_is_unparsed_and_no_loss(
    place: Callable[..., int], server: Server, action: Action
) -> None:
    def rule(messages: list[dict[str, str]]) -> Action:
        return action if texts(messages)["prompt"] == "Prompt 1." else longer_wins(messages)

    server.rule = rule
    assert place("--against", "B", "--asks", "2") == 0
    figures = pairs()
    assert (figures["wins"], figures["ties"], figures["losses"]) == (1, 1, 1)
    assert (figures["n"], figures["unparsed"]) == (3, 1)
    assert server.count == 6 + 2 * 2
    again = [request["messages"] for request in server.requests if len(request["messages"]) == 3]
    assert len(again) == 2
    assert all("could not be read" in messages[-1]["content"] for messages in again)
    assert place("--against", "B", "--asks", "2") == 0
    assert server.count == 10


def test_a_reply_that_ends_inside_an_emoji_stops_nothing(
    place: Callable[..., int], server: Server
) -> None:
    """JSON may hold half of a surrogate pair, in the judge's words and in its name."""
    half = {"model": "stub\ud83d", "choices": [{"message": {"content": "nice \ud83d"}}]}
    server.script = [Action(body=json.dumps(half).encode())]
    assert place("--against", "B") == 0
    assert server.requests[1]["messages"][1]["content"] == "nice \\ud83d"
    assert pairs()["wins"] == 2
    assert results()["replied_as"] == {"stub\\ud83d": 1, "stub-1": 8}
    assert place("--against", "B") == 0
    assert server.count == 9


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_ends_it_at_once_and_keeps_what_is_there(
    place: Callable[..., int], server: Server, capfd: pytest.CaptureFixture[str], status: int
) -> None:
    echo = json.dumps({"error": {"message": f"wrong key {KEY}"}}).encode()
    good = [longer_wins([{"content": server_question(0)}])]
    server.script = [*good, Action(status=status, body=echo)]
    assert place("--against", "B") == 2
    assert server.count == 2
    printed = capfd.readouterr()
    assert f"status {status}" in printed.err
    assert "kept: replies so far are in cache.jsonl" in printed.err
    assert KEY not in printed.out + printed.err
    server.rule = lambda messages: Action(text=f'Your key is {KEY}.\n{{"better": "tie"}}')
    assert place("--against", "B") == 0
    assert server.count == 2 + 7
    assert server.keys == [f"Bearer {KEY}"] * 9
    files = [path for path in Path().rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if KEY in path.read_text()]
    assert results()["config"]["api_key_env"] == "JUDGE_KEY"


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_prompt_leaves_the_others(
    place: Callable[..., int], server: Server, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    """Prompts 1 and 2 are refused, in both orders: four questions in a row."""
    echo = json.dumps({"error": {"message": f"content filter {KEY}"}}).encode()

    def rule(messages: list[dict[str, str]]) -> Action:
        is_bad = texts(messages)["prompt"] in ("Prompt 1.", "Prompt 2.")
        return Action(status=status, body=echo) if is_bad else longer_wins(messages)

    server.rule = rule
    assert place("--against", "B", "--retries", "2") == 2
    assert server.count == 8  # no refusal is tried again
    printed = capsys.readouterr()
    assert "4 questions got no reply" in printed.err and "content filter" in printed.err
    figures = pairs()
    assert (figures["n"], figures["unanswered"]) == (2, 2)
    assert (figures["wins"], figures["ties"], figures["losses"]) == (1, 1, 0)
    reasons = results()["this_command"]["no_reply"]
    assert [f"status {status}" in reason for reason in reasons] == [True] * 4
    assert KEY not in printed.out + printed.err + json.dumps(results())
    server.rule = longer_wins
    assert place("--against", "B") == 0
    assert server.count == 8 + 4 and pairs()["wins"] == 2


def test_an_endpoint_that_refuses_every_prompt_is_given_up(
    place: Callable[..., int], server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.rule = lambda messages: Action(status=400, body=b'{"error": "max_tokens?"}')
    assert place("--against", "B") == 2
    error = capsys.readouterr().err
    assert "no reply to 3 questions in a row" in error and "--max_tokens_name" in error
    assert server.count == 3


def test_no_organisation_of_the_environment_is_sent(
    place: Callable[..., int], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-secret")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-secret")
    assert place("--against", "B", "--limit", "1") == 0
    sent = json.dumps(server.headers)
    assert KEY in sent
    assert "org-secret" not in sent and "proj-secret" not in sent


def test_a_dead_endpoint_is_given_up(
    place: Callable[..., int], server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    start = time.monotonic()
    assert place("--against", "B", "--base_url", closed, "--retries", "1") == 2
    assert "no reply to 3 questions in a row" in capsys.readouterr().err
    server.rule = lambda messages: Action(status=429, headers={"Retry-After": "3600"})
    assert place("--against", "B") == 2
    assert "asks to wait 3600 s" in capsys.readouterr().err
    assert server.count == 3
    assert time.monotonic() - start < 10


def test_one_question_without_a_reply_leaves_the_others(
    place: Callable[..., int], server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    def rule(messages: list[dict[str, str]]) -> Action:
        is_bad = texts(messages)["first-answer"] == "bbb" and "Prompt 1" in messages[0]["content"]
        return Action(status=502) if is_bad else longer_wins(messages)

    server.rule = rule
    assert place("--against", "B", "--retries", "2") == 2
    assert "1 questions got no reply" in capsys.readouterr().err
    assert server.count == 7 + 3
    figures = pairs()
    assert (figures["n"], figures["unanswered"], figures["losses"]) == (3, 1, 1)
    assert results()["complete"] is False
    server.rule = longer_wins
    assert place("--against", "B") == 0
    assert server.count == 7 + 3 + 1
    assert pairs()["wins"] == 2


def test_a_budget_of_requests_stops_and_goes_on(
    place: Callable[..., int], server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = [place("--against", "B", "--max_requests", "3") for _ in range(4)]
    assert codes == [75, 75, 0, 0]
    assert server.count == 8
    assert "stopped by max_requests=3" in capsys.readouterr().err
    assert pairs()["wins"] == 2


def test_a_budget_of_less_than_one_question_is_told(
    place: Callable[..., int], server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what the message advises, every question can be asked."""
    options = ["--against", "B", "--input_price", "2", "--output_price", "30"]
    assert place(*options, "--max_cost", "0.0001") == 2
    assert server.count == 0
    told = capsys.readouterr().err
    assert "max_cost=0.0001 is less than one question can cost" in told
    advised = re.search(r"fix: --max_cost ([\d.]+), or", told)
    assert advised is not None
    assert 0.015 < float(advised[1]) < 0.03  # 512 · 30 / 10⁶, and two for each of some 1000 bytes
    codes = [place(*options, "--max_cost", advised[1]) for _ in range(9)]
    assert codes[-1] == 0 and set(codes) <= {0, 75}
    assert pairs()["wins"] == 2


def test_a_budget_of_cost_is_never_passed(place: Callable[..., int], server: Server) -> None:
    """A reply costs (100 · 2 + 10 · 30) / 10⁶ = 0.0005; what it may cost at most is more."""
    price = ["--input_price", "2", "--output_price", "30", "--max_tokens", "20"]
    assert place("--against", "B", *price, "--max_cost", "0.005", "--concurrency", "3") == 75
    spent = results()["this_command"]["cost"]
    assert 0 < server.count < 8
    assert spent == pytest.approx(0.0005 * server.count)
    assert spent <= 0.005
    assert place("--against", "B", *price) == 0
    assert server.count == 8
    assert results()["replies"]["cost"] == pytest.approx(8 * 0.0005)

    server.usage = None  # then each reply counts as what it may cost at most
    write_cell("A", ["x"] * 4, seed=20)
    assert place("--seeds", "[20]", *price, "--max_cost", "0.01") == 75
    assert results("score")["replies"]["tokens_not_told"] >= 1
    assert 0.005 < results("score")["this_command"]["cost"] <= 0.01


@pytest.mark.parametrize(
    ("action", "is_billed"),
    [
        (Action(status=500), True),
        (Action(reset=True), True),
        (Action(sleep=0.5), True),
        (Action(text="x", drip=0.05), True),
        (Action(status=429), False),
    ],
)
def test_tries_that_may_be_billed_count(
    place: Callable[..., int], server: Server, action: Action, is_billed: bool
) -> None:
    """A try without a reply costs what it can at most, and a budget ends before the next try."""
    price = ["--input_price", "2", "--output_price", "30", "--max_tokens", "20"]
    quick = ["--timeout", "0.3", "--limit", "1", "--retries", "3", "--grade_references", "false"]
    server.script = [action] * 2
    assert place(*price, *quick) == 0
    size = len(json.dumps(server.requests[0]["messages"], ensure_ascii=False).encode())
    most = ((size + 100) * 2 + 20 * 30) / 1e6
    found = results("score")["this_command"]
    assert found["lost_tries"] == 2 * is_billed
    assert found["cost"] == pytest.approx(0.0005 + 2 * most * is_billed)

    write_cell("A", ["another"], seed=20)
    server.script, before = [action] * 4, server.count
    budget = ["--seeds", "[20]", "--max_cost", str(2.5 * most)]
    assert place(*price, *quick, *budget) == (75 if is_billed else 2)
    assert server.count - before == (2 if is_billed else 4)
    assert results("score")["this_command"]["cost"] <= 2.5 * most


def test_a_refused_connection_costs_nothing(place: Callable[..., int]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    price = ["--input_price", "2", "--output_price", "30", "--max_cost", "1", "--retries", "1"]
    assert place(*price, "--base_url", closed, "--limit", "1") == 2
    found = results("score")["this_command"]
    assert (found["lost_tries"], found["cost"]) == (0, 0.0)


def test_concurrency(place: Callable[..., int], server: Server) -> None:
    def slowly(messages: list[dict[str, str]]) -> Action:
        action = longer_wins(messages)
        action.sleep = 0.1
        return action

    server.rule = slowly
    assert place("--against", "B", "--concurrency", "3") == 0
    assert server.most_at_once == 3
    assert pairs()["wins"] == 2


def test_a_signal_keeps_what_was_paid_for(
    place: Callable[..., int], server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop_at_third(number: int) -> None:
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    server.on_request = stop_at_third
    assert place("--against", "B", "--concurrency", "2") == 143
    assert "SIGTERM" in capsys.readouterr().err
    asked = server.count
    assert 3 <= asked < 8
    server.on_request = lambda number: None
    assert place("--against", "B") == 0
    assert server.count == 8


@pytest.mark.slow
def test_a_kill_costs_at_most_what_was_under_way(place: Callable[..., int], server: Server) -> None:
    killed: list[subprocess.Popen[bytes]] = []

    def kill_at_fifth(number: int) -> None:
        if number == 5:
            killed[0].send_signal(signal.SIGKILL)

    server.on_request = kill_at_fifth
    with running(server) as address:
        options = ["--against", "B", "--model", "org/stub", "--api_key_env", "JUDGE_KEY"]
        command = [sys.executable, "-m", "distilllens", "judge", "A", "--base_url", address]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        killed.append(subprocess.Popen([*command, *options, "--concurrency", "1"], env=environment))
        assert killed[0].wait(timeout=120) == -signal.SIGKILL
    file = Path("A/judge/org-stub/cache.jsonl")
    kept = len(file.read_text().splitlines())
    assert kept == 4
    with file.open("a") as stream:
        stream.write('{"key": "12')  # as a kill in the middle of a line leaves it
    server.on_request = lambda number: None
    assert place("--against", "B") == 0
    assert server.count == 5 + 4
    assert pairs()["wins"] == 2


def test_a_dry_run_sends_and_writes_nothing(
    place: Callable[..., int],
    server: Server,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("JUDGE_KEY")
    assert place("--against", "B", "--dry_run") == 0
    assert "4 pairs: 8 questions, 0 settled already" in capsys.readouterr().out
    assert server.count == 0
    assert not Path("A/judge").exists()
    assert place("--against", "B", "--api_key_env", "null", "--limit", "1") == 0
    assert server.keys == ["Bearer none"] * 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--against", "C"], 2, "C holds no finished evaluation"),
        (["--against", "B", "--seeds", "[10, 20]"], 2, "A has no finished seed20/words"),
        (["--against", "more"], 2, "A has no finished seed20/words"),
        (["--against", "fewer"], 2, "4 prompts against 2"),
        (["--against", "others"], 2, "line 3 of samples.jsonl"),
        (["--against", "broken"], 3, "broken/seed10/words/samples.jsonl:2"),
        (["--against", "B", "--api_key_env", "UNSET_KEY"], 2, "UNSET_KEY holds no key"),
        (["--api_key_env", KEY], 2, "must be the NAME"),
        (["--base_url", f"http://u:{KEY}@h/v1"], 2, "without user, password"),
        (["--base_url", f"http://h/v1?key={KEY}"], 2, "without user, password"),
        (["--base_url", "http://[::1/v1"], 2, "address of an endpoint"),
        (["--max_cost", "1"], 2, "max_cost needs input_price"),
        (["--concurrency", "0"], 2, "concurrency=0 must be ≥ 1"),
        (["--mode", "x"], 2, "unknown flag --mode (did you mean --model?)"),
        (["--output_dir", "A/seed10/words/results.json"], 6, "cannot write"),
    ],
)
def test_errors_for_users(
    place: Callable[..., int],
    server: Server,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    write_cell("more", WORDS["B"])
    write_cell("more", WORDS["B"], seed=20)
    write_cell("fewer", WORDS["B"][:2])
    write_cell("others", WORDS["B"])
    write_cell("broken", WORDS["B"])
    other = Path("others/seed10/words/samples.jsonl")
    other.write_text(other.read_text().replace("Prompt 2.", "Prompt 2!"))
    broken = Path("broken/seed10/words/samples.jsonl")
    broken.write_text(broken.read_text().replace('"answer": "bbb"}', '"answer": 3}', 1))
    assert place(*arguments) == code
    error = capsys.readouterr().err
    assert message in error
    assert KEY not in error
    assert "Traceback" not in error
    assert server.count == 0
    assert not Path("A/judge").exists()


def test_a_missing_package_is_named(
    place: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "openai" else find(name)
    )
    assert place() == 2
    assert "bash scripts/setup.sh judge" in capsys.readouterr().err


@pytest.mark.usefixtures("place")
def test_what_evaluate_writes_is_judged_and_the_report_overlooks_it(
    place: Callable[..., int],
    server: Server,
    tiny_gpt2: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    tiny_gpt2(n_positions=256).save_pretrained("model")
    tiny_tokenizer.save_pretrained("model")
    Path("data/toy").mkdir(parents=True)
    rows = [{"instruction": f"Say {w}.", "input": "", "output": w} for w in ("red", "blue")]
    Path("data/toy/valid.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    options = ["--sets", "[toy]", "--eval.max_new_tokens", "8", "--eval.seeds", "[10, 20]"]
    folders = {"E": "1.0", "F": "0.5"}
    for folder, temperature in folders.items():
        more = ["--output_dir", folder, "--eval.temperature", temperature]
        assert evaluate.main(["--checkpoint", "model", *options, *more]) == 0
    scores = collect_scores([Path("E")])
    assert place("--against", "F", answers="E") == 0
    assert results("against-F-*", "E")["summary"]["toy"]["n"] == 4
    assert "### Instruction:" in texts(server.requests[0]["messages"])["prompt"]
    assert collect_scores([Path("E")]) == scores
    assert len(scores) == 2
