"""Bad inputs by hand: records, YAML, flags, model folders, names; what each is refused with.

``CASES`` is one table: name → what is wrong with a small workspace, the command that meets it, the
exit code, and a pattern of the message. ``ROOT`` in flags and patterns stands for the workspace.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Edit = Callable[[Path], None]
Command = Literal["train", "evaluate", "prepare"]

GOOD = b'{"instruction": "Sort.", "input": "b a", "output": "a b"}'


def leave(root: Path) -> None:
    """Changes nothing."""


@dataclass(frozen=True, kw_only=True)
class BadInput:
    """Something wrong in a workspace or on a command line, and what the user is told."""

    command: Command = "train"
    code: int
    told: str
    """Pattern that the message must match, mostly file, line, key or value."""
    flags: tuple[str, ...] = ()
    edit: Edit = leave


def write(name: str, content: bytes | str) -> Edit:
    """Returns an edit that writes a file of the workspace."""

    def edit(root: Path) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return edit


def change(name: str, *path: str, **changes: Any) -> Edit:
    """Returns an edit that changes keys of a JSON file, below the keys of ``path``."""

    def edit(root: Path) -> None:
        content = json.loads((root / name).read_text(encoding="utf-8"))
        part = content
        for key in path:
            part = part[key]
        part.update(changes)
        (root / name).write_text(json.dumps(content), encoding="utf-8")

    return edit


# --- Records ------------------------------------------------------------------------------------

BROKEN_LINES: dict[str, tuple[bytes, str]] = {
    "cut off": (b'{"instruction":', r"invalid JSON at column 16"),
    "no value": (b'{"instruction": "x", "output": }', r"invalid JSON at column 32"),
    "no quotes": (b'{"a": 1, bad: 2}', r"invalid JSON at column 10"),
    "single quotes": (b"{'instruction': 'i'}", r"invalid JSON at column 2"),
    "two objects": (GOOD + GOOD, r"invalid JSON at column 58"),
    "trailing comma": (b'{"instruction": "i", "output": "o",}', r"invalid JSON at column 3\d"),
    "array": (b'["instruction", "output"]', r"expected a JSON object, got an array"),
    "string": (b'"instruction"', r"expected a JSON object, got a string"),
    "number": (b"12", r"expected a JSON object, got a number"),
    "NaN": (b"NaN", r"expected a JSON object, got a number"),
    "null": (b"null", r"expected a JSON object, got null"),
    "raw NUL": (b'{"instruction": "a\0b"}', r"invalid JSON at column 19"),
    "raw escape sequence": (b'{"instruction": "\x1b[31mred"}', r"invalid JSON at column 18"),
    "escaped NUL": (
        b'{"instruction": "a\\u0000b", "output": "o"}',
        r"field 'instruction' holds a NUL at character 2",
    ),
    "lone surrogate": (
        b'{"instruction": "i", "output": "ab\\ud83d"}',
        r"field 'output' holds the lone surrogate U\+D83D at character 3",
    ),
    "lone surrogate in a name": (
        b'{"instruction": "i", "out\\ud83d\\u001b[31m": "o"}',
        r"field 'output' is missing \(fields: 'instruction', 'out\\ud83d\\x1b\[31m'\)",
    ),
    "invalid UTF-8": (b'{"instruction": "caf\xe9"}', r"invalid UTF-8 at byte 21 \(0xe9\)"),
    "UTF-16": (GOOD.decode().encode("utf-16"), r"invalid UTF-8 at byte 1 \(0xff\)"),
    "missing field": (b'{"instruction": "i", "input": ""}', r"field 'output' is missing"),
    "misspelt field": (b'{"instructions": "i", "output": "o"}', r"field 'instruction' is missing"),
    "wrong type": (
        b'{"instruction": 7, "output": "o"}',
        r"'instruction' must be a string, got a n",
    ),
    "object as answer": (
        b'{"instruction": "i", "output": {}}',
        r"'output' must be a string, got an",
    ),
    "wrong optional field": (
        b'{"instruction": "i", "input": ["x"], "output": "o"}',
        r"field 'input' must be a string, got an array",
    ),
    "null answer": (
        b'{"instruction": "i", "output": null}',
        r"'output' must be a string, got null",
    ),
    "doubled field": (
        b'{"instruction": "i", "instruction": "j", "output": "o"}',
        r"field 'instruction' occurs twice",
    ),
    "deep nesting": (b"[" * 200_000, r"invalid JSON: nested too deeply"),
    "huge number": (b'{"n": ' + b"9" * 5000 + b"}", r"invalid JSON: Exceeds the limit"),
    "a broken line of 1 MB": (
        b'{"instruction": "' + b"x" * 1_000_000,
        r"invalid JSON at column 17",
    ),
}
"""Kind → one line, and what is said about it."""

SETS = {"train": "raw.jsonl", "prepare": "raw.jsonl", "evaluate": "valid.jsonl"}


def records(name: str, content: bytes) -> Edit:
    return write(f"data/toy/{name}", content)


def record_cases() -> Iterator[tuple[str, BadInput]]:
    commands: tuple[Command, ...] = ("train", "prepare", "evaluate")
    for command in commands:
        file = SETS[command]
        for kind, (line, told) in BROKEN_LINES.items():
            content = b"\n".join([*[GOOD] * 30, line, GOOD])
            pattern = rf"ROOT/data/toy/{file}:31: .*{told}"
            edit = records(file, content)
            yield f"{command}: {kind}", BadInput(command=command, code=3, told=pattern, edit=edit)
        whole_files = {
            "empty file": (b"", "the file is empty"),
            "blank lines": (b"\n \r\n\n", "0 usable records in 0 lines"),
            "only a byte-order mark": (b"\xef\xbb\xbf", "0 usable records in 0 lines"),
            "a picture": (b"\x89PNG\r\n\x1a\n\0\0", r":1: invalid UTF-8 at byte 1 \(0x89\)"),
            "a JSON array over lines": (
                b'[\n{"instruction": "i"},\n]\n',
                r":1: invalid JSON at col",
            ),
        }
        for kind, (content, told) in whole_files.items():
            pattern, edit = rf"ROOT/data/toy/{file}.*{told}", records(file, content)
            yield f"{command}: {kind}", BadInput(command=command, code=3, told=pattern, edit=edit)

    def pipe(root: Path) -> None:
        (root / "data/toy/raw.jsonl").unlink()
        os.mkfifo(root / "data/toy/raw.jsonl")

    def folder(root: Path) -> None:
        (root / "data/toy/raw.jsonl").unlink()
        (root / "data/toy/raw.jsonl").mkdir()

    few = b"\n".join([GOOD] * 15)
    empty = json.dumps({"instruction": "i", "input": "", "output": " "}).encode()
    long = json.dumps({"instruction": "x " * 2000, "input": "", "output": "y"}).encode()
    skip = ("--data.bad_lines", "skip")
    yield from {
        "records: a pipe": BadInput(
            code=3, told=r"raw\.jsonl: cannot be read: it is no", edit=pipe
        ),
        "records: a folder": BadInput(code=3, told=r"raw\.jsonl: cannot be read: it", edit=folder),
        "records: no such folder": BadInput(
            code=3, told=r"ROOT/gone/raw\.jsonl: no such file", flags=("--data.path", "ROOT/gone")
        ),
        "records: fewer than a batch": BadInput(
            code=3,
            told=r"3 training records of ROOT/data/toy are fewer than one global batch of 8",
            edit=records("raw.jsonl", few),
        ),
        "records: no more than the dev set": BadInput(
            code=3,
            told=r"0 usable training records",
            edit=records("raw.jsonl", b"\n".join([GOOD] * 12)),
        ),
        "records: only empty answers": BadInput(
            code=3,
            told=r"0 usable training records\n.*8 have empty answers",
            edit=records("raw.jsonl", b"\n".join([GOOD] * 12 + [empty] * 8)),
        ),
        "records: only over-long prompts": BadInput(
            code=3,
            told=r"0 usable training records\n.*9 have over-long prompts",
            edit=records("raw.jsonl", b"\n".join([GOOD] * 12 + [long] * 9)),
        ),
        "records: nothing left after skipping": BadInput(
            code=3,
            told=r"0 usable records in 2 lines\n  why: .*raw\.jsonl:1: invalid JSON",
            flags=skip,
            edit=records("raw.jsonl", b"{\n[]\n"),
        ),
    }.items()


# --- YAML ---------------------------------------------------------------------------------------

YAML_FILES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "expected a mapping of sections, got None"),
    "a list": ("[1, 2]", r"expected a mapping of sections, got \[1, 2\]"),
    "a text": ("optim", "expected a mapping of sections, got 'optim'"),
    "two documents": ("run: {name: a}\n---\nrun: {name: b}\n", r":2:1: not YAML"),
    "no closing bracket": ("optim: {lr: 1\n", r":2:1: not YAML"),
    "colons": ("a: b: c", r":1:5: not YAML"),
    "a tab": ("optim:\n\tlr: 1", r":2:1: not YAML: .*\\t"),
    "a NUL": ("run: {name: \0}", "not YAML"),
    "not UTF-8": (b"optim: {lr: 1}\nrun: {name: \xff\xfe}", r":2: not YAML: invalid UTF-8"),
    "deep lists": ("[" * 5000, "nested too deeply"),
    "deep mappings": ("a: " + "{a: " * 2000, "nested too deeply"),
    "megabytes": ("#" * 1_000_001, "1,000,001 bytes are no configuration"),
    "doubled key": ("optim: {lr: 1, lr: 2}", r":1:16: key 'lr' occurs twice, first in line 1"),
    "doubled section": ("optim: {lr: 1}\noptim: {lr: 2}", r":2:1: key 'optim' occurs twice"),
    "doubled far apart": ("run:\n  seed: 1\n  name: a\n  seed: 2\n", r":4:3: .*first in line 2"),
    "an anchor": ("optim: &o {lr: 1}", r":1:8: anchors and aliases"),
    "an alias": ("run: {name: *n}", r":1:13: anchors and aliases"),
    "billion laughs": (
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n",
        r":1:4: anchors and aliases",
    ),
    "a merge key": ("run: {<<: {name: x}}", r":1:7: merge keys"),
    "a Python object": (
        "run: !!python/object/apply:os.system ['touch CANARY']",
        r":1:6: the tag .*python/object/apply:os\.system is not read",
    ),
    "a Python name": ("run: {name: !!python/name:os.system }", r":1:13: the tag"),
    "a binary": ("run: {name: !!binary 'xx'}", r":1:13: the tag"),
    "a set": ("run: !!set {a, b}", r":1:6: the tag"),
    "an own tag": ("optim: {lr: !float 'x'}", r":1:13: the tag"),
    "a list as key": ("? [a, b]\n: c", "not YAML"),
    "numbers as keys": ("{1: 2}", "unknown key 1"),
    "null as key": ("null: {a: 1}", r"unknown key None\.a"),
    "unknown key": ("optim: {wamup: 3}", r"unknown key optim\.wamup \(did you mean optim\.warmup"),
    "unknown section": (
        "optimizer: {lr: 1}",
        r"unknown key optimizer\.lr \(did you mean optim\.lr",
    ),
    "section is a number": ("optim: 3", "optim must be a mapping of keys, got 3"),
    "section is a list": ("objective: {lens: [1]}", r"objective\.lens must be a mapping"),
    "section is null": ("optim:", "optim must be a mapping of keys, got None"),
    "value is null": ("run: {resume: }", r"run\.resume must have a value, got null"),
    "number is null": ("optim: {lr: }", r"optim\.lr must have a value, got null"),
    "infinity": ("optim: {lr: .inf}", r"optim\.lr=inf must be a finite number"),
    "overflow": ("optim: {lr: 1.0e+400}", r"optim\.lr=inf must be a finite number"),
    "not a number": ("optim: {lr: .nan}", r"optim\.lr=nan must be a finite number"),
    "infinite weight": (
        "objective: {lens: {weights: [1, .inf]}}",
        r"objective\.lens\.weights=\[1\.0, inf\] must be a finite number",
    ),
    "huge integer": (f"run: {{seed: {10**30}}}", r"run\.seed=10+ must fit into 64 bits"),
    "endless integer": (f"run: {{seed: {'9' * 5000}}}", "Exceeds the limit"),
    "list for a number": ("optim: {lr: [1]}", r"optim\.lr"),
    "text for a number": ("optim: {lr: fast}", r"optim\.lr.*fast"),
    "number for a list": ("eval: {seeds: 7}", r"eval\.seeds"),
    "boolean for a name": (
        "run: {name: yes}",
        r"run\.name must be a text or null, got True\n  fix: quote",
    ),
    "boolean for a choice": ("tracking: {wandb: on}", r"tracking\.wandb"),
    "bare wall time in seconds": (
        "run: {max_wall_time: 5400}",
        r"run\.max_wall_time must be a text or null, got 5400\n  fix: quote it",
    ),
    "wall time without seconds": ("run: {max_wall_time: 1:30}", "'1:30' is not HH:MM:SS"),
    "NUL in a name": ('run: {name: "a\\0b"}', r"run\.name='a\\x00b' must not hold control"),
    "lone surrogate in a path": (
        'run: {output_dir: "\\ud83d"}',
        r"run\.output_dir=.*broken Unicode",
    ),
    "escape sequence in a path": ('data: {path: "\\e[31m"}', r"data\.path='\\x1b\[31m' must not"),
    "empty path": ("run: {output_dir: ''}", r"run\.output_dir='' must not be empty"),
}


def yaml_cases() -> Iterator[tuple[str, BadInput]]:
    for kind, (content, told) in YAML_FILES.items():
        yield (
            f"YAML: {kind}",
            BadInput(
                code=2,
                told=told,
                flags=("--config", "ROOT/layer.yaml"),
                edit=write("layer.yaml", content),
            ),
        )


# --- Flags --------------------------------------------------------------------------------------

FLAGS: dict[str, str] = {
    "--optim.lrr 1": r"unknown flag --optim\.lrr \(did you mean --optim\.lr\?\)",
    "--optim.epoch 3": r"unknown flag --optim\.epoch",
    "--local_rank 0": r"unknown flag --local_rank",
    "-x": "x",
    "stray": "stray",
    "--": "unknown flag --",
    "--optim.lr": r"optim\.lr",
    "--optim 3": "optim",
    "--config": "config",
    "--config ROOT/gone.yaml": r"--config ROOT/gone\.yaml: no such file",
    "--config ROOT": "--config ROOT: no such file",
    "--config " + "x" * 300: "File name too long",
    "--optim.lr fast": r"optim\.lr.*fast",
    "--optim.lr nan": r"optim\.lr.*nan",
    "--optim.lr inf": r"optim\.lr.*inf",
    "--optim.lr 1e999": r"optim\.lr=inf must be a finite number",
    "--optim.lr -1": r"optim\.lr=-1\.0 must be > 0",
    "--optim.epochs 2.5": r"optim\.epochs.*2\.5",
    "--optim.epochs " + "9" * 5000: r"optim\.epochs.*Exceeds the limit",
    "--optim.max_steps 99999999999999999999": r"optim\.max_steps=9+ must fit into 64 bits",
    "--optim.micro_batch_size 0": r"optim\.micro_batch_size=0 must be ≥ 1",
    "--run.seed -1": r"run\.seed=-1 must be ≥ 0",
    "--run.output_dir=": r"run\.output_dir='' must not be empty",
    "--run.name a\0b": r"run\.name='a\\x00b'",
    "--run.name a\udcffb": r"run\.name=.*broken Unicode",
    "--model.student a\0b": r"model\.student='a\\x00b'",
    "--data.path a\nb": r"data\.path='a\\nb' must not hold control characters",
    "--run.name ../x": r"run\.name='\.\./x' must have at most 200 characters",
    "--run.name ..": r"run\.name='\.\.' must have",
    f"--run.name {'x' * 300}": r"run\.name='x+ must have at most 200 characters",
    "--run.max_wall_time 90": "'90' is not HH:MM:SS",
    "--run.max_wall_time 1:60:00": "'1:60:00' is not HH:MM:SS",
    "--eval.seeds [1,a]": r"eval\.seeds",
    "--eval.seeds [1,2": r"eval\.seeds",
    "--eval.seeds " + "[" * 3000: r"eval\.seeds",
    "--eval.seeds []": r"eval\.seeds must not be empty",
    "--eval.top_p 0": r"eval\.top_p=0\.0 must be > 0 and ≤ 1",
    "--objective.approach seqdk": r"objective\.approach.*seqdk",
    "--objective.divergence kl": r"objective\.divergence.*kl",
    "--objective.lens {a": r"objective\.lens",
    "--objective.lens.weights [.inf,1]": r"objective\.lens\.weights=\[inf, 1\.0\] must be a finite",
    "--objective.lens.coeff -1": r"objective\.lens\.coeff=-1\.0 must be ≥ 0",
    "--objective.lens.teacher_layers [1.5]": r"teacher_layers",
    "--objective.lens.teacher_layers [1]": "must be given together",
    "--model {student:x,student:x}": "--model is a section",
    "--model.student_lora.r null": r"model\.student_lora\.r must have a value, got null",
    "--model.student_lora.r 0": r"student_lora\.r=0 must be ≥ 1",
    "--model.trust_remote_code true": r"model\.trust_remote_code needs model\.revision",
    "--model.gradient_checkpointing maybe": r"gradient_checkpointing",
    "--tracking.wandb on": r"tracking\.wandb",
    "--deepspeed ROOT/gone.json": r"ROOT/gone\.json: no such file",
    "--deepspeed ROOT": r"deepspeed=ROOT: is a directory",
    "--data.processed=": r"data\.processed='' must not be empty",
    "--model.student ROOT/gone": "model folder ROOT/gone not found",
    "--model.teacher ROOT/gone": "model folder ROOT/gone not found",
    "--model.student nobody-here/gone": "nobody-here/gone not found locally, nor on the hub",
    "--model.student " + "y" * 300: "model folder yyy.* not found",
    "--model.student ~nobody-here/x": "model folder ~nobody-here/x not found",
    "--model.student ROOT/student/config.json": r"config\.json is a file, not a model folder",
    "--model.student ROOT/data": r"ROOT/data holds no config\.json",
    "--objective.lens.count 3": r"lens\.count=3 must be in \[1, 2\]",
}
"""Arguments, parted at spaces → what is said."""

LAYERS: dict[str, tuple[str, str, str]] = {
    "out of range": ("[2, 7]", "[1, 2]", r"layer 7 is out of range \[1, 6\]"),
    "zero": ("[0, 2]", "[1, 2]", r"layer 0 is out of range \[1, 6\]"),
    "negative": ("[1, 2]", "[-1, 2]", r"layer -1 is out of range \[1, 3\]"),
    "unequal": ("[1, 2, 3]", "[1, 2]", r"teacher_layers has 3 entries .*student_layers has 2"),
    "doubled": ("[2, 2]", "[1, 2]", "teacher_layers: 2 after 2; layers must incr"),
    "not increasing": ("[4, 2]", "[1, 2]", "teacher_layers: 2 after 4; layers must incr"),
    "empty": ("[]", "[]", "teacher_layers"),
    "huge": (f"[{2**62}]", "[1]", rf"layer {2**62} is out of range"),
}


def flag_cases() -> Iterator[tuple[str, BadInput]]:
    for text, told in FLAGS.items():
        flags = tuple(text.split(" "))
        yield f"flags: {text[:60]!r}", BadInput(code=2, told=told, flags=flags)
    for kind, (teacher, student, told) in LAYERS.items():
        flags = (
            *("--objective.lens.teacher_layers", teacher),
            *("--objective.lens.student_layers", student),
        )
        yield f"layers: {kind}", BadInput(code=2, told=told, flags=flags)
    evaluate: dict[str, tuple[int, str]] = {
        "--sers [toy]": (2, r"unknown flag --sers \(did you mean"),
        "--sets [..]": (2, r"evaluation set '\.\.' is no plain name"),
        "--sets [../data/toy]": (2, r"evaluation set '\.\./data/toy' is no plain name"),
        "--sets [/etc]": (2, r"evaluation set '/etc' is no plain name"),
        "--sets [toy/]": (2, r"evaluation set 'toy/' is no plain name"),
        "--sets [.hidden]": (2, r"evaluation set '\.hidden' is no plain name"),
        f"--sets [{'x' * 300}]": (2, r"evaluation set 'x{120}' is no plain name"),
        '--sets ["a\\0b"]': (2, r"must not hold control characters"),
        "--name /a": (2, "name='/a' must have at most 200 characters"),
        "--sets [ty]": (3, r"evaluation set ty: no file ROOT/data/ty/valid\.jsonl"),
        "--sets [toy,toy]": (2, "names a set twice"),
        "--sets []": (2, "sets must not be empty"),
        "--limit 0": (2, "limit=0 must be ≥ 1"),
        "--eval.seeds [1,1]": (2, "names a seed twice"),
        "--eval.seeds [-1]": (2, r"eval\.seeds=\[-1\] must be ≥ 0"),
        "--max_prompt_length 0": (2, "max_prompt_length=0 must be ≥ 1"),
        "--max_prompt_length 1": (2, "max_prompt_length=1 leaves no room for an instruction"),
        "--max_prompt_length 1 --eval.long_prompts drop": (
            3,
            "none of 10 prompts is within max_prompt_length=1",
        ),
        "--eval.max_new_tokens 9999": (2, "9999"),
        "--checkpoint ROOT/gone": (
            2,
            r"model folder ROOT/gone not found\n  fix: .* another --checkpoint\n",
        ),
        "--data_dir ROOT/gone": (3, "ROOT/gone/toy/valid"),
        "--trust_remote_code true": (2, "trust_remote_code needs revision"),
        "--output_dir=": (2, "output_dir='' must not be empty"),
        "--output_dir ROOT/data/toy/raw.jsonl/x": (6, r"cannot write ROOT/data/toy/raw\.jsonl/x"),
    }
    for text, (code, told) in evaluate.items():
        flags = tuple(text.split(" "))
        name = f"evaluate flags: {text[:40]!r}"
        yield name, BadInput(command="evaluate", code=code, told=told, flags=flags)
    prepare: dict[str, tuple[int, str]] = {
        "--modle x": (2, r"unknown flag --modle \(did you mean --model\?\)"),
        "--model ROOT/gone": (2, "model folder ROOT/gone not found"),
        "--dev_size x": (2, "dev_size"),
        "--dev_size -1": (2, "dev_size=-1 must be ≥ 0"),
        "--max_length 1": (2, "max_length=1 must be ≥ 2"),
        "--data ROOT/gone": (3, r"ROOT/gone/raw\.jsonl: no such file"),
        "--processed ROOT/data": (6, "ROOT/data holds other things than tokenised data"),
        "--processed ROOT/data/toy/raw.jsonl/x": (6, r"raw\.jsonl/x: cannot be written"),
        "--trust_remote_code true": (2, "needs --revision"),
    }
    for text, (code, told) in prepare.items():
        flags = tuple(text.split(" "))
        name = f"prepare flags: {text!r}"
        yield name, BadInput(command="prepare", code=code, told=told, flags=flags)


# --- Model folders ------------------------------------------------------------------------------

CONFIG, TOKENS, TOKENIZER = (
    "student/config.json",
    "student/tokenizer.json",
    "student/tokenizer_config.json",
)

HOSTILE_SIZES: dict[str, Edit] = {
    "10⁹ blocks": change(CONFIG, n_layer=10**9),
    "10⁹ blocks by another name": change(CONFIG, num_hidden_layers=10**9),
    "10⁹ blocks of Qwen2": change(CONFIG, model_type="qwen2", num_hidden_layers=10**9),
    "10⁹ labels": change(CONFIG, num_labels=10**9),
    "10⁹ experts": change(CONFIG, model_type="mixtral", num_local_experts=10**9),
    "10⁹ inner blocks": change(CONFIG, text_config={"num_hidden_layers": 10**9}),
    "10³⁰ tokens": change(CONFIG, vocab_size=10**30),
    "10⁹ wide": change(CONFIG, n_embd=10**9),
}
"""Each would fill the memory before a weight is read."""

CONFIG_FILES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "config.json: Expecting value"),
    "cut off": ('{"model_type": "gpt2"', r"config\.json: "),
    "a list": ("[]", r"config\.json: it is no JSON object"),
    "null": ("null", r"config\.json: it is no JSON object"),
    "nothing in it": ("{}", r"config\.json: "),
    "noise": (b"\xff\xfe\x00", r"config\.json: "),
    "nested 100,000 deep": ('{"a":' + "[" * 100_000, r"config\.json is nested too deeply"),
    "nested 900 deep": ('{"a":' + "[" * 900 + "]" * 900 + "}", "nested too deeply"),
    "5000 digits": ('{"n_layer": ' + "9" * 5000 + "}", r"config\.json: Exceeds the limit"),
    "megabytes": ('{"a": "' + "x" * 10_000_000 + '"}', r"10,000,009 bytes are no config\.json"),
}
CONFIG_CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown family": ({"model_type": "no-such-family"}, "no-such-family"),
    "family is a number": ({"model_type": 7}, r"config\.json"),
    "family is a list": ({"model_type": ["gpt2"]}, r"config\.json"),
    "family is a path": ({"model_type": "../../x"}, r"\.\./\.\./x"),
    "family without next tokens": ({"model_type": "clip"}, "clip is no causal language model"),
    "blocks as text": ({"n_layer": "3"}, "n_layer|num_hidden_layers"),
    "blocks as fraction": ({"n_layer": 2.5}, "n_layer|num_hidden_layers"),
    "blocks are null": ({"n_layer": None}, "n_layer|num_hidden_layers"),
    "no blocks": ({"n_layer": 0}, r"num_hidden_layers=0 must be a whole number in \[1"),
    "minus one block": ({"n_layer": -1}, r"num_hidden_layers=-1 must be a whole number in \[1"),
    "NaN blocks": ({"n_layer": float("nan")}, "n_layer=NaN is no number"),
    "width is a list": ({"n_embd": [8]}, "n_embd|hidden_size"),
    "no width": ({"n_embd": 0}, "hidden_size=0 must be a whole number|ZeroDivision"),
    "vocabulary is an object": ({"vocab_size": {}}, "vocab_size"),
    "no vocabulary": ({"vocab_size": 0}, r"vocab_size=0 must be a whole number in \[1"),
    "vocabulary below the tokenizer's": ({"vocab_size": 299}, "299"),
    "vocabulary is true": ({"vocab_size": True}, "vocab_size"),
    "dtype is code": ({"dtype": "os.system"}, r"config\.json"),
    "labels are a number": ({"id2label": 7}, r"config\.json"),
    "method is overwritten": ({"get_text_config": 3}, r"config\.json"),
    "code inside": (
        {"text_config": {"auto_map": {"AutoConfig": "own.C"}}},
        "asks to run Python code.*own",
    ),
    "code of a family without next tokens": (
        {"model_type": "clip", "auto_map": {"AutoModelForCausalLM": "own.M"}},
        "asks to run Python code.*own",
    ),
    "code of an unknown family": (
        {"model_type": "made-up", "auto_map": {"AutoConfig": "own.Config"}},
        r"config\.json asks to run Python code: auto_map",
    ),
    "code of the hub": (
        {"model_type": "new", "auto_map": {"AutoModelForCausalLM": "evil/repo--own.Model"}},
        "asks to run Python code.*evil/repo",
    ),
    "code map is a number": ({"auto_map": 7}, "asks to run Python code: auto_map=7"),
    "kernel of the hub": (
        {"attn_implementation": "evil/repo"},
        "asks to run Python code: attn_implementation='evil/repo'",
    ),
    "kernel of the hub inside": (
        {"text_config": {"_attn_implementation": "evil/repo:main"}},
        "asks to run Python code: _attn_implementation",
    ),
}
TOKENIZER_FILES: dict[str, tuple[str, str | bytes]] = {
    "empty": (TOKENS, ""),
    "null": (TOKENS, "null"),
    "a number": (TOKENS, "7"),
    "a list": (TOKENS, "[]"),
    "nothing in it": (TOKENS, "{}"),
    "noise": (TOKENS, b"\xff\x00"),
    "deep": (TOKENS, "[" * 100_000),
    "settings empty": (TOKENIZER, ""),
    "settings null": (TOKENIZER, "null"),
    "settings are a list": (TOKENIZER, "[]"),
    "settings are deep": (TOKENIZER, '{"a":' * 100_000),
}
TOKENIZER_CHANGES: dict[str, tuple[Edit, str]] = {
    "no model": (change(TOKENS, model=None), "its tokenizer"),
    "unknown model": (change(TOKENS, "model", type="No"), "its tokenizer"),
    "vocabulary is a list": (change(TOKENS, "model", vocab=[]), "its tokenizer"),
    "negative id": (change(TOKENS, "model", "vocab", pear=-1), "its tokenizer.*-1"),
    "id beyond 32 bits": (change(TOKENS, "model", "vocab", pear=2**40), "its tokenizer"),
    "id beyond the embeddings": (
        change(TOKENS, "model", "vocab", pear=5000),
        r"token 'pear' with id 5000, the model has 300 rows",
    ),
    "id of four billion": (
        change(TOKENS, "model", "vocab", pear=2**32 - 2),
        r"token 'pear' with id 4294967294, the model has 300 rows",
    ),
    "merge of unknown tokens": (
        change(TOKENS, "model", merges=[["zz", "yy"]]),
        "its tokenizer.*zz",
    ),
    "added tokens are a number": (change(TOKENS, added_tokens=7), "its tokenizer"),
    "unknown splitter": (change(TOKENS, pre_tokenizer={"type": "evil"}), "its tokenizer"),
    "another version": (change(TOKENS, version="9"), "its tokenizer.*9"),
    "EOS is a number": (change(TOKENIZER, eos_token=7), "its tokenizer: .*eos_token"),
    "EOS is null": (change(TOKENIZER, eos_token=None), "has 300 tokens and eos_token=None"),
    "EOS is new": (change(TOKENIZER, eos_token="<end>"), "token '<end>' with id 300, .* 300 rows"),
    "class is a number": (change(TOKENIZER, tokenizer_class=7), "its tokenizer"),
    "side is unknown": (change(TOKENIZER, padding_side="up"), "its tokenizer: Padding side"),
    "inputs are a number": (change(TOKENIZER, model_input_names=7), "its tokenizer"),
    "code": (
        change(TOKENIZER, tokenizer_class="T", auto_map={"AutoTokenizer": ["own.T", None]}),
        r"tokenizer_config\.json asks to run Python code",
    ),
}


def rename(old: str, new: str) -> Edit:
    """Returns an edit that renames a file of the workspace."""

    def edit(root: Path) -> None:
        (root / old).rename(root / new)

    return edit


def cut(name: str, size: int) -> Edit:
    """Returns an edit that cuts the end of a file off."""

    def edit(root: Path) -> None:
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[:-size])

    return edit


def swap_tokens(root: Path) -> None:
    """Gives two tokens of the student each other's id."""
    path = root / TOKENS
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    names = {index: token for token, index in vocabulary.items()}
    vocabulary[names[11]], vocabulary[names[23]] = 23, 11
    path.write_text(json.dumps(content), encoding="utf-8")


WEIGHTS = "student/model.safetensors"
WEIGHT_FILES: dict[str, tuple[Edit, str]] = {
    "gone": (rename(WEIGHTS, "elsewhere"), "cannot load ROOT/student"),
    "pickle only": (
        rename(WEIGHTS, "student/pytorch_model.bin"),
        r"pytorch_model\.bin is a pickle, .*only safetensors are read\n  fix: .*save_pretrained",
    ),
    "empty": (write(WEIGHTS, b""), "header"),
    "pointer of git-lfs": (
        write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"),
        "header",
    ),
    "noise": (write(WEIGHTS, b"\xff" * 99), "header"),
    "header of 10¹⁸ bytes": (write(WEIGHTS, (10**18).to_bytes(8, "little") + b"{}"), "header"),
    "cut short": (cut(WEIGHTS, 100), "cannot load ROOT/student"),
    "another width": (change(CONFIG, n_embd=32), "cannot load ROOT/student"),
    "another vocabulary": (change(CONFIG, vocab_size=400), "cannot load ROOT/student"),
    "more blocks": (change(CONFIG, n_layer=7), r"its weights lack \d+ tensors"),
    "terabytes": (
        change(CONFIG, vocab_size=10_000_000, n_embd=100_000, n_layer=500),
        r"config\.json asks for [\d,]{17,} weights, the files hold [\d,]+ bytes",
    ),
}
"""Met when weights load; the others before."""


def model_cases() -> Iterator[tuple[str, BadInput]]:
    for kind, edit in HOSTILE_SIZES.items():
        told = r"cannot load ROOT/student\n  why: .*must be"
        yield f"config.json: {kind}", BadInput(code=2, told=told, edit=edit)
    for kind, (content, told) in CONFIG_FILES.items():
        edit = write(CONFIG, content)
        yield f"config.json: {kind}", BadInput(code=2, told=told, edit=edit)
    for kind, (changes, told) in CONFIG_CHANGES.items():
        yield f"config.json: {kind}", BadInput(code=2, told=told, edit=change(CONFIG, **changes))
    for kind, (file, content) in TOKENIZER_FILES.items():
        edit = write(file, content)
        yield f"tokenizer: {kind}", BadInput(code=2, told="ROOT/student", edit=edit)
    for kind, (edit, told) in TOKENIZER_CHANGES.items():
        yield f"tokenizer: {kind}", BadInput(code=2, told=told, edit=edit)
    told = r"tokenizers differ: 2 of 300 ids differ, first 11: '.' against '.'"
    yield "tokenizer: two tokens swapped", BadInput(code=2, told=told, edit=swap_tokens)
    for kind, (edit, told) in WEIGHT_FILES.items():
        yield f"weights: {kind}", BadInput(command="evaluate", code=2, told=told, edit=edit)


# --- DeepSpeed files, folders, states -----------------------------------------------------------

DEEPSPEED_FILES: dict[str, tuple[str | bytes, str]] = {
    "cut off": ("{", r"ds\.json: not JSON"),
    "noise": (b"\xff\xfe", r"ds\.json: not JSON"),
    "a list": ("[]", r"ds\.json: expected a JSON object"),
    "an optimizer": ('{"optimizer": {}}', r"ds\.json: remove optimizer"),
    "fp16 with stage 0": ('{"fp16": {"enabled": true}}', r"ds\.json: fp16 needs ZeRO stage 1"),
    "deep": ("[" * 100_000, r"ds\.json: not JSON"),
    "a number for a section": ('{"bf16": 7}', r"ds\.json: bf16 must be an object, got 7"),
    "a list for a section": ('{"zero_optimization": []}', "zero_optimization must be an object"),
    "an unknown stage": ('{"zero_optimization": {"stage": 4}}', "must be 0 to 3, got 4"),
    "a stage as text": ('{"zero_optimization": {"stage": "x"}}', "must be 0 to 3, got 'x'"),
    "bf16 with stage 0": ('{"bf16": {"enabled": true}}', r"ds\.json: bf16 needs ZeRO stage 1"),
}


def blocking_file(root: Path) -> None:
    (root / "file").write_text("not a folder", encoding="utf-8")


def other_cases() -> Iterator[tuple[str, BadInput]]:
    for kind, (content, told) in DEEPSPEED_FILES.items():
        flags, edit = ("--deepspeed", "ROOT/ds.json"), write("ds.json", content)
        yield f"deepspeed: {kind}", BadInput(code=2, told=told, flags=flags, edit=edit)


CASES: dict[str, BadInput] = {}
for _cases in (record_cases(), yaml_cases(), flag_cases(), model_cases(), other_cases()):
    for _name, _case in _cases:
        assert _name not in CASES, f"{_name} stands there twice"
        CASES[_name] = _case

WRITING_CASES: dict[str, BadInput] = {
    "broken line": CASES["train: cut off"],
    "hostile config.json": CASES["config.json: code inside"],
    "output folder under a file": BadInput(
        code=6,
        told=r"run\.output_dir=ROOT/file/run cannot be written",
        flags=("--run.output_dir", "ROOT/file/run"),
        edit=blocking_file,
    ),
    "output folder with a name of 300 characters": BadInput(
        code=6,
        told=r"run\.output_dir=.* cannot be written",
        flags=("--run.output_dir", "ROOT/" + "z" * 300),
    ),
    "no state to go on from": BadInput(
        code=4, told=r"run\.resume=must", flags=("--run.resume", "must")
    ),
    "a state that is none": BadInput(
        code=4, told="ROOT/student", flags=("--run.resume", "ROOT/student")
    ),
}
"""Trained in earnest, not as a dry run: these reach the run folder, or would make it."""
