"""The command ``prepare``: its flags, its table, and a hub that is not there."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from distilllens.cli.prepare import PrepareConfig, prepare_main
from distilllens.config import DataConfig, EvalConfig
from distilllens.data import prepare
from distilllens.data.benchmarks import BENCHMARKS
from distilllens.data.prepare import PUBLISHED_SETS
from distilllens.errors import ConfigError, DataError


@pytest.fixture
def workplace(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_gpt2,
) -> Path:
    """A working folder with checkpoints/student and data/small/raw.jsonl (12 records)."""
    monkeypatch.chdir(tmp_path)
    tiny_gpt2().save_pretrained("checkpoints/student")
    tiny_tokenizer.save_pretrained("checkpoints/student")
    rows = [{"instruction": f"Write {n}", "input": "", "output": "a word"} for n in range(12)]
    Path("data/small").mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    Path("data/small/raw.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def test_prepares_and_prints_the_counts(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", "checkpoints/student", "--data", "data/small", "--dev_size", "4"]
    assert prepare_main(argv) == 0
    screen = capsys.readouterr().out
    assert "processed_data/small/full/gpt2-" in screen
    cells = [line.split("│")[1:4] for line in screen.splitlines() if "│" in line]
    counts = {c[0].strip(): (c[1].strip(), c[2].strip()) for c in cells}
    assert counts["records"] == counts["used"] == ("8", "4")
    assert counts["dropped: prompt too long"] == ("0", "0")
    (manifest,) = workplace.glob("processed_data/small/full/gpt2-*/manifest.json")
    before = manifest.stat().st_mtime_ns
    assert prepare_main(argv) == 0
    assert manifest.stat().st_mtime_ns == before
    assert len(list(workplace.glob("processed_data/small/full/*"))) == 1


def test_every_flag_arrives(workplace: Path) -> None:
    raw = workplace / "data/small/raw.jsonl"
    raw.write_bytes(raw.read_bytes() + b"{\n")
    argv = "--model checkpoints/student --data data/small --dev_size 2 --processed own/folder "
    argv += "--max_length 99 --max_prompt_length 98 --bad_lines skip"
    assert prepare_main(argv.split()) == 0
    manifest = json.loads((workplace / "own/folder/manifest.json").read_text(encoding="utf-8"))
    source = {k: v for k, v in manifest["source"].items() if k in DataConfig.__annotations__}
    assert source == {"max_length": 99, "max_prompt_length": 98, "bad_lines": "skip"}
    assert manifest["source"]["dev_size"] == 2
    assert manifest["stats"]["skipped_lines"] == 1


def test_defaults_are_those_of_training() -> None:
    config, data = PrepareConfig(), DataConfig()
    assert config.data == data.path
    assert config.dev_size == EvalConfig().dev_size
    for name in ("processed", "max_length", "max_prompt_length", "bad_lines"):
        assert getattr(config, name) == getattr(data, name)


def test_help_documents_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        prepare_main(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in PrepareConfig.__annotations__:
        assert f"--{name}" in text
    assert "Longest prompt in tokens" in text and "default: 256" in text


@pytest.mark.parametrize(
    ("argv", "error", "text"),
    [
        ([], ConfigError, "--model"),
        (["--model", "checkpoints/nothing"], ConfigError, "checkpoints/nothing"),
        (["--modle", "x"], ConfigError, "did you mean --model"),
        (["--model", "checkpoints/student", "--dev_size", "x"], ConfigError, "dev_size"),
        (["--model", "checkpoints/student", "--data", "data/no"], DataError, "data/no/raw.jsonl"),
        (["--model", "checkpoints/student", "--trust_remote_code", "true"], ConfigError, "revis"),
    ],
)
def test_wrong_usage(workplace: Path, argv: list[str], error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        prepare_main(argv)
    assert not (workplace / "processed_data").exists()


HF_API = prepare.HfApi

# --- download -----------------------------------------------------------------------------------


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(16)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("flag", [["--download"], ["--download", "true"], ["--download=true"]])
def test_download_in_offline_mode_stops_at_once(workplace: Path, flag: list[str]) -> None:
    start = time.monotonic()
    with pytest.raises(DataError, match="cannot reach MiniLLM/dolly") as caught:
        prepare_main(flag)
    assert time.monotonic() - start < 5
    assert caught.value.exit_code == 3
    assert "offline" in caught.value.why


def test_download_from_a_closed_port_does_not_retry(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(prepare, "HfApi", lambda: HF_API(endpoint=f"http://127.0.0.1:{port}"))
    start = time.monotonic()
    with pytest.raises(DataError, match="cannot reach MiniLLM/dolly"):
        prepare_main(["--download"])
    assert time.monotonic() - start < 5


def test_download_from_a_silent_server_gives_up(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, silent_server: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(prepare, "HUB_TIMEOUT", 0.5)
    monkeypatch.setattr(prepare, "HfApi", lambda: HF_API(endpoint=silent_server))
    start = time.monotonic()
    with pytest.raises(DataError, match="cannot reach MiniLLM/dolly") as caught:
        prepare_main(["--download"])
    assert time.monotonic() - start < 5
    assert caught.value.why


def test_download_puts_every_set_where_evaluation_looks(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a stand-in of the hub's one function: the network part has no test offline."""
    kept = workplace / "data/dolly/valid.jsonl"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine", encoding="utf-8")
    asked: list[tuple[str, str]] = []

    def fetch(repository: str, file: str, *, local_dir: Path, **_: object) -> None:
        asked.append((repository, file))
        target = local_dir / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("fetched", encoding="utf-8")

    monkeypatch.setattr(prepare, "hf_hub_download", fetch)
    monkeypatch.setattr(prepare, "_check_connection", lambda repository: None)
    prepare.download_published_sets("data", console=Console(quiet=True))
    for path, _ in BENCHMARKS.values():
        assert (workplace / "data" / path).is_file()
    assert (workplace / "data/dolly/raw.jsonl").read_text(encoding="utf-8") == "fetched"
    assert kept.read_text(encoding="utf-8") == "mine"
    assert sorted(asked) == [
        ("MiniLLM/Vicuna", "valid.jsonl"),
        ("MiniLLM/dolly", "raw.jsonl"),
        ("MiniLLM/self-inst", "valid.jsonl"),
        ("MiniLLM/sinst", "11_/valid.jsonl"),
        ("MiniLLM/uinst", "11_/valid.jsonl"),
    ]
    assert set(PUBLISHED_SETS) == set(BENCHMARKS)
    prepare.download_published_sets("data", console=Console(quiet=True))
    assert len(asked) == 5


def test_file_that_the_hub_does_not_have(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: object, **__: object) -> None:
        raise FileNotFoundError("404: no such entry\nmore lines")

    monkeypatch.setattr(prepare, "hf_hub_download", fetch)
    monkeypatch.setattr(prepare, "_check_connection", lambda repository: None)
    with pytest.raises(DataError, match=r"MiniLLM/dolly: raw\.jsonl was not fetched") as caught:
        prepare_main(["--download"])
    assert caught.value.why == "404: no such entry"
