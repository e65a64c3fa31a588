"""Tokenised once, reused by fingerprint, rebuilt when the source changes; nothing lost untold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers import processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from distilllens.config import DataConfig
from distilllens.data import progress, tokenize
from distilllens.data.encode import encode_prompts, encode_responses, tokenizer_fingerprint
from distilllens.data.prompts import alpaca_prompt
from distilllens.data.tokenize import PreparedData, prepare_dataset, record_lengths
from distilllens.errors import ConfigError, DataError, StorageError

Prepare = Callable[..., PreparedData]
BuildTokenizer = Callable[..., PreTrainedTokenizerFast]


def write_raw(folder: Path, rows: list[dict[str, str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "raw.jsonl").write_text(text, encoding="utf-8")


def row(n: int, output: str = "a word or two", instruction: str = "Write") -> dict[str, str]:
    return {"instruction": f"{instruction} {n}", "input": "", "output": output}


@pytest.fixture
def prepare(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Prepare:
    """prepare_dataset on tmp_path/raw, which holds 20 records, 5 of them for dev."""
    write_raw(tmp_path / "raw", [row(n) for n in range(20)])

    def call(
        *,
        dev_size: int = 5,
        tokenizer: PreTrainedTokenizerFast = tiny_tokenizer,
        build: bool = True,
        write: bool = True,
        console: Console | None = None,
        **data: object,
    ) -> PreparedData:
        options = {
            "path": str(tmp_path / "raw"),
            "processed": str(tmp_path / "tokens"),
            "max_length": 200,
            "max_prompt_length": 150,
        }
        return prepare_dataset(
            data=DataConfig(**{**options, **data}),  # type: ignore[arg-type]
            dev_size=dev_size,
            tokenizer=tokenizer,
            family="gpt2",
            build=build,
            write=write,
            console=console or Console(file=StringIO(), width=80),
        )

    return call


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_ino) for p in files}


def with_template(
    tokenizer: PreTrainedTokenizerFast, prefix: str, suffix: str
) -> PreTrainedTokenizerFast:
    """Makes a tokenizer put special tokens around a text, as Llama's does with BOS."""
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    ids = [("<s>", tokenizer.convert_tokens_to_ids("<s>")), ("<|endoftext|>", 0)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{prefix} $A {suffix}".strip(), special_tokens=ids
    )
    return tokenizer


# --- what the tokens are ------------------------------------------------------------------------


def test_rows_hold_prompt_and_response_separately(
    prepare: Prepare, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    prepared = prepare()
    assert (len(prepared.train), len(prepared.dev)) == (15, 5)
    assert prepared.train.column_names == ["prompt_ids", "response_ids"]
    assert prepared.dev.column_names == ["prompt_ids", "response_ids", "prompt", "reference"]
    for part, first in ((prepared.dev, 0), (prepared.train, 5)):
        for offset, sample in enumerate(part):
            prompt = tiny_tokenizer.decode(sample["prompt_ids"])
            assert prompt == alpaca_prompt(f"Write {first + offset}")
            assert tiny_tokenizer.decode(sample["response_ids"]) == "a word or two<|endoftext|>"
            assert sample["response_ids"].count(tiny_tokenizer.eos_token_id) == 1
    assert prepared.dev[0]["prompt"] == alpaca_prompt("Write 0")
    assert prepared.dev[0]["reference"] == "a word or two"
    assert str(prepared.train.features["prompt_ids"].feature.dtype) == "int32"


def test_tables_are_memory_mapped(prepare: Prepare) -> None:
    assert prepare().train.cache_files[0]["filename"].endswith(".arrow")


def test_bos_is_kept_and_eos_never_ends_a_prompt(build_tokenizer: BuildTokenizer) -> None:
    plain = build_tokenizer()("one two")["input_ids"]
    bos = with_template(build_tokenizer(), "<s>", "")
    bos_id = bos.convert_tokens_to_ids("<s>")
    assert encode_prompts(bos, ["one two"]) == [[bos_id, *plain]]
    assert encode_responses(bos, ["one two"]) == [[*plain, 0]]
    both = with_template(build_tokenizer(), "<s>", "<|endoftext|>")
    assert encode_prompts(both, ["one two"]) == [[bos_id, *plain]]
    assert encode_responses(both, ["one two"]) == [[*plain, 0]]
    assert encode_prompts(both, []) == encode_responses(both, []) == []


def test_every_lost_record_is_counted(
    tmp_path: Path, prepare: Prepare, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    good = row(1)
    prompt_length = len(tiny_tokenizer(alpaca_prompt("Write 1"))["input_ids"])
    answer_length = len(tiny_tokenizer("a word or two")["input_ids"])
    exact = "z" * (200 - prompt_length - 1)  # one token a letter: fits with EOS, to the token
    assert len(tiny_tokenizer(exact)["input_ids"]) == len(exact)
    rows = [
        good,  # dev
        row(2, output="  \n"),  # dev, empty
        row(3, output="q" * 500),  # dev, cut
        good,
        row(4, instruction="word " * 200),  # over-long
        row(5, output=""),
        row(6, output="", instruction="word " * 200),  # counted once, as empty
        {**good, "output": exact},
        {**good, "output": exact + "z"},  # EOS is what is cut
    ]
    write_raw(tmp_path / "raw", rows)
    prepared = prepare(dev_size=3)
    train, dev = prepared.stats["train"], prepared.stats["dev"]
    assert dev["records"] == 3 and train["records"] == 6
    assert (dev["used"], dev["overlong_prompts"], dev["empty_answers"]) == (2, 0, 1)
    assert (train["used"], train["overlong_prompts"], train["empty_answers"]) == (3, 1, 2)
    assert (dev["cut_responses"], train["cut_responses"]) == (1, 1)
    assert train["prompt_tokens"] == 3 * prompt_length
    assert train["response_tokens"] == answer_length + 1 + 2 * (200 - prompt_length)
    assert train["longest"] == 200
    assert prepared.stats["lines"] == 9
    responses = prepared.train["response_ids"]
    assert responses[1][-1] == tiny_tokenizer.eos_token_id
    assert responses[2][-1] != tiny_tokenizer.eos_token_id
    assert len(responses[1]) == len(responses[2])
    told = "1 over-long prompts dropped, 3 empty answers dropped, 2 responses cut"
    assert told in prepared.summary()


def test_prompt_of_exactly_the_limit_stays(
    prepare: Prepare, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    length = len(tiny_tokenizer(alpaca_prompt("Write 7"))["input_ids"])
    kept = prepare(max_prompt_length=length, dev_size=0)
    assert len(kept.train) >= 10
    with pytest.raises(DataError, match="0 usable training records"):
        prepare(max_prompt_length=length - 1, dev_size=0)


def test_skipped_lines_are_counted_and_named(tmp_path: Path, prepare: Prepare) -> None:
    path = tmp_path / "raw" / "raw.jsonl"
    path.write_bytes(b"{\n" + path.read_bytes())
    with pytest.raises(DataError, match=r"raw\.jsonl:1: invalid JSON at column 2"):
        prepare()
    screen = StringIO()
    prepared = prepare(bad_lines="skip", console=Console(file=screen, width=80))
    assert prepared.stats["skipped_lines"] == 1
    assert "1 broken lines skipped" in prepared.summary()
    assert "raw.jsonl:1: invalid JSON" in screen.getvalue()
    assert prepared.dev[0]["prompt"] == alpaca_prompt("Write 0")


def test_chunks_do_not_change_anything(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepare()
    monkeypatch.setattr(tokenize, "CHUNK_RECORDS", 4)
    parts = prepare(processed=str(whole.folder) + "-chunks")
    assert parts.stats == whole.stats
    assert parts.train.to_list() == whole.train.to_list()
    assert parts.dev.to_list() == whole.dev.to_list()


# --- once, and anew when it must be -------------------------------------------------------------


def test_second_call_reuses(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare()
    before = stamps(first.folder)
    assert len(before) >= 5

    def fail(*_: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(tokenize, "encode_prompts", fail)
    for build in (True, False):
        again = prepare(build=build)
        assert again.fingerprint == first.fingerprint
        assert again.stats == first.stats
        assert again.train.to_list() == first.train.to_list()
    assert stamps(first.folder) == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"max_length": 190}, "max_length was 200, now 190"),
        ({"max_prompt_length": 149}, "max_prompt_length was 150, now 149"),
        ({"dev_size": 6}, "dev_size was 5, now 6"),
        ({"bad_lines": "skip"}, "bad_lines was error, now skip"),
        ({"tokenizer": "smaller"}, "tokenizer was"),
        ({"tokenizer": "with BOS"}, "tokenizer was"),
    ],
    ids=["max_length", "max_prompt_length", "dev_size", "bad_lines", "vocabulary", "BOS"],
)
def test_change_of_the_source_rebuilds(
    prepare: Prepare, build_tokenizer: BuildTokenizer, change: dict, reason: str
) -> None:
    tokenizers = {
        "smaller": build_tokenizer(280),
        "with BOS": with_template(build_tokenizer(), "<s>", ""),
    }
    if "tokenizer" in change:
        change = {"tokenizer": tokenizers[change["tokenizer"]]}
    first = prepare()
    before = stamps(first.folder)
    with pytest.raises(DataError, match=reason):
        prepare(build=False, **change)
    assert stamps(first.folder) == before
    screen = StringIO()
    second = prepare(console=Console(file=screen, width=80), **change)
    assert reason in screen.getvalue()
    assert second.fingerprint != first.fingerprint
    assert second.folder == first.folder
    assert set(stamps(first.folder).values()).isdisjoint(before.values())
    assert prepare(build=False, **change).fingerprint == second.fingerprint


def test_changed_raw_file_rebuilds(tmp_path: Path, prepare: Prepare) -> None:
    first = prepare()
    write_raw(tmp_path / "raw", [row(n) for n in range(1, 21)])
    with pytest.raises(DataError, match="raw_sha256 was"):
        prepare(build=False)
    second = prepare()
    assert second.fingerprint != first.fingerprint
    assert second.dev[0]["prompt"] == alpaca_prompt("Write 1")


def test_train_size_is_a_view_and_rebuilds_nothing(prepare: Prepare) -> None:
    full = prepare()
    before = stamps(full.folder)
    some = prepare(train_size=4, build=False)
    assert some.train.to_list() == full.train.to_list()[:4]
    assert len(some.dev) == 5
    assert some.fingerprint == full.fingerprint
    assert len(prepare(train_size=99).train) == 15
    assert stamps(full.folder) == before


@pytest.mark.parametrize("name", ["train/data-00000-of-00001.arrow", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_folder_is_rebuilt(prepare: Prepare, name: str, damage: str) -> None:
    first = prepare()
    expected = first.train.to_list()
    path = first.folder / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=name.replace("train/", "")):
        prepare(build=False)
    assert prepare().train.to_list() == expected


def test_failed_build_leaves_the_old_data_and_no_rest(
    prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare()
    before = stamps(first.folder)

    rename = tokenize.os.rename

    def no_way_in(source: Path, target: Path) -> None:
        if target == first.folder and "building" in source.name:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(tokenize.os, "rename", no_way_in)
    with pytest.raises(StorageError, match="cannot be written: No space left"):
        prepare(max_length=190)
    monkeypatch.undo()
    assert stamps(first.folder) == before
    assert [p.name for p in first.folder.parent.iterdir() if p.name.startswith(".")] == []
    assert prepare(build=False).fingerprint == first.fingerprint


def test_full_disk_is_a_storage_error(
    tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenize.Dataset, "save_to_disk", full_disk)
    with pytest.raises(StorageError, match="cannot be written: No space left"):
        prepare()
    assert [p.name for p in tmp_path.iterdir()] == ["raw"]


def test_built_by_another_process_meanwhile(
    prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = tokenize.os.rename

    def beaten(source: Path, target: Path) -> None:
        shutil.copytree(source, target)
        rename(source, target)  # onto a folder that is not empty

    monkeypatch.setattr(tokenize.os, "rename", beaten)
    assert len(prepare().train) == 15


def test_folder_of_something_else_is_not_touched(tmp_path: Path, prepare: Prepare) -> None:
    thesis = tmp_path / "tokens" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years of work", encoding="utf-8")
    with pytest.raises(StorageError, match="other things"):
        prepare()
    assert thesis.read_text(encoding="utf-8") == "years of work"


def test_target_below_a_file(tmp_path: Path, prepare: Prepare) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StorageError, match="cannot be written"):
        prepare(processed=str(tmp_path / "file" / "tokens"))


def test_default_folder(tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepared = prepare(processed=None, path="raw/")
    assert prepared.folder == Path(f"processed_data/raw/full/gpt2-{prepared.fingerprint[:8]}")
    assert {p.name for p in prepared.folder.iterdir()} == {"train", "dev", "manifest.json"}
    manifest = json.loads((prepared.folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["fingerprint"] == prepared.fingerprint
    assert str(tmp_path) not in json.dumps(manifest)


def test_other_lengths_have_a_default_folder_of_their_own(
    tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    long = prepare(processed=None)
    before = stamps(long.folder)
    short = prepare(processed=None, max_length=199)
    fewer = prepare(processed=None, dev_size=4)
    assert len({long.folder, short.folder, fewer.folder}) == 3
    assert stamps(long.folder) == before
    assert prepare(processed=None).folder == long.folder


def test_without_writing_every_folder_stays_as_it_is(tmp_path: Path, prepare: Prepare) -> None:
    prepare()
    before = stamps(tmp_path)
    screen = StringIO()
    console = Console(file=screen, width=80)
    seen = prepare(max_length=199, train_size=3, write=False, console=console)
    assert stamps(tmp_path) == before
    assert "would be tokenised anew: max_length was 200, now 199" in screen.getvalue()
    written = prepare(max_length=199, train_size=3)
    assert seen.train[:] == written.train[:] and seen.dev[:] == written.dev[:]
    assert len(seen.train) == 3
    assert seen.fingerprint == written.fingerprint and seen.stats == written.stats
    assert seen.folder == written.folder and seen.summary() == written.summary()
    assert list(record_lengths(seen.train)) == list(record_lengths(written.train))


# --- what does not work, and says so ------------------------------------------------------------


def test_nothing_prepared_and_build_false(prepare: Prepare) -> None:
    with pytest.raises(DataError, match="it is not there"):
        prepare(build=False)


def test_no_training_records(prepare: Prepare) -> None:
    with pytest.raises(DataError, match="0 usable training records") as caught:
        prepare(dev_size=20)
    assert "20 are the dev set" in caught.value.why


def test_no_usable_dev_record(tmp_path: Path, prepare: Prepare) -> None:
    write_raw(tmp_path / "raw", [row(0, output=" "), row(1)])
    with pytest.raises(DataError, match="0 usable dev records"):
        prepare(dev_size=1)


def test_no_dev_set(prepare: Prepare) -> None:
    prepared = prepare(dev_size=0)
    assert (len(prepared.train), len(prepared.dev)) == (20, 0)
    assert prepared.dev.column_names == ["prompt_ids", "response_ids", "prompt", "reference"]


def test_no_raw_file(tmp_path: Path, prepare: Prepare) -> None:
    with pytest.raises(DataError, match=r"nowhere/raw\.jsonl: no such file"):
        prepare(path=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("limits", [(100, 100), (100, 101)])
def test_lengths_without_room(prepare: Prepare, limits: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=f"max_prompt_length={limits[1]}"):
        prepare(max_length=limits[0], max_prompt_length=limits[1])


def test_tokenizer_without_eos(prepare: Prepare, build_tokenizer: BuildTokenizer) -> None:
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="eos_token"):
        prepare(tokenizer=tokenizer)


# --- fingerprints, lengths, progress ------------------------------------------------------------


def test_tokenizer_fingerprint_survives_saving_and_calls(
    tmp_path: Path, build_tokenizer: BuildTokenizer
) -> None:
    tokenizer = build_tokenizer()
    fingerprint = tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(build_tokenizer()) == fingerprint
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == fingerprint
    tokenizer.pad_token = tokenizer.eos_token
    padded = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == padded


def test_tokenizer_fingerprint_sees_every_change_of_ids(build_tokenizer: BuildTokenizer) -> None:
    added = build_tokenizer()
    added.add_tokens(["pear"])
    swapped = build_tokenizer()
    state = json.loads(swapped.backend_tokenizer.to_str())
    state["model"]["merges"] = state["model"]["merges"][:-1]
    swapped = PreTrainedTokenizerFast(
        tokenizer_object=type(swapped.backend_tokenizer).from_str(json.dumps(state)),
        eos_token="<|endoftext|>",
    )
    tokenizers = [
        build_tokenizer(),
        added,
        swapped,
        with_template(build_tokenizer(), "<s>", ""),
        build_tokenizer(280),
    ]
    assert len({tokenizer_fingerprint(t) for t in tokenizers}) == len(tokenizers)


def test_fingerprint_of_a_tokenizer_in_python() -> None:
    assert not ByT5Tokenizer().is_fast
    assert tokenizer_fingerprint(ByT5Tokenizer()) == tokenizer_fingerprint(ByT5Tokenizer())
    assert tokenizer_fingerprint(ByT5Tokenizer()) != tokenizer_fingerprint(
        ByT5Tokenizer(extra_ids=7)
    )


def test_record_lengths(prepare: Prepare) -> None:
    table = prepare().train
    expected = [len(s["prompt_ids"]) + len(s["response_ids"]) for s in table]
    assert record_lengths(table).tolist() == expected
    assert record_lengths(table.select([7, 2])).tolist() == [expected[7], expected[2]]
    assert record_lengths(table.select([])).tolist() == []


def test_bar_with_eta_on_a_terminal_only(prepare: Prepare) -> None:
    terminal, pipe = StringIO(), StringIO()
    prepare(console=Console(file=terminal, width=100, force_terminal=True))
    assert "ETA" in terminal.getvalue() and "tokenising" in terminal.getvalue()
    prepare(max_length=190, console=Console(file=pipe, width=40))
    assert "\x1b" not in pipe.getvalue() and "ETA" not in pipe.getvalue()
    assert "tokenised anew: max_length was 200, now 190" in pipe.getvalue()


def test_plain_lines_when_it_takes_long(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_INTERVAL", 0.0)
    monkeypatch.setattr(tokenize, "CHUNK_RECORDS", 5)
    screen = StringIO()
    prepare(console=Console(file=screen, width=80))
    lines = [line for line in screen.getvalue().splitlines() if line.startswith("tokenising")]
    assert [line.split(",")[0] for line in lines] == [
        f"tokenising: {n} of 20 records" for n in (5, 10, 15)
    ]
    assert all("ETA 0 s" in line for line in lines)


def test_nothing_is_printed_without_build(
    prepare: Prepare, capfd: pytest.CaptureFixture[str]
) -> None:
    prepare()
    screen = StringIO()
    prepare(build=False, console=Console(file=screen))
    assert screen.getvalue() == ""
    assert capfd.readouterr() == ("", "")
