"""An exported student where others use it: in a pipeline, evaluated again, on the hub.

The hub is a server on loopback that speaks the few routes of an upload; the library that talks to
it is the real one.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workspace, stop_at
from huggingface_hub import HfApi, ModelCard, constants
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast, pipeline

import evaluate
from distilllens.__main__ import main as command
from distilllens.cli.push import push_main
from distilllens.config import SamplingConfig
from distilllens.data.prompts import alpaca_prompt
from distilllens.errors import CheckpointError, ConfigError, StorageError, UserError
from distilllens.evaluation.cells.provenance import checkpoint_fingerprint
from distilllens.evaluation.generation import generate_answers
from distilllens.publish.export import write_model
from train import main

TOKEN = "hf_" + "Z9y8" * 8

# --- In a pipeline ------------------------------------------------------------------------------

QUESTIONS = ["Sort: cat dog", "Name three colours.", "a"]


def end_at(model: Any, tokenizer: PreTrainedTokenizerFast, place: int) -> None:
    """Makes greedy answers to the first question end by EOS within ``place`` tokens."""
    ids = tokenizer(alpaca_prompt(QUESTIONS[0]), return_tensors="pt")["input_ids"]
    new = model.generate(ids, max_new_tokens=place, do_sample=False, pad_token_id=0)
    token, head = int(new[0, -1]), model.lm_head.weight
    with torch.no_grad():
        head[tokenizer.eos_token_id] = 2 * head[token]


def test_a_pipeline_answers_as_the_evaluation_does(
    tmp_path: Path,
    tiny_llama: Callable[..., LlamaForCausalLM],
    build_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:
    """The head has ten rows that are no tokens; the base brought a template and a penalty."""
    tokenizer = build_tokenizer()
    model = tiny_llama(vocab=310, n_positions=256, seed=3)
    with torch.no_grad():
        model.lm_head.weight[300:] *= 50  # would win
        model.lm_head.weight[:300] *= 20
    assert not isinstance(model.generation_config, dict)
    model.generation_config.repetition_penalty = 1.1
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    sampling = SamplingConfig(do_sample=False, max_new_tokens=30)
    end_at(model, tokenizer, 6)
    write_model(model, tokenizer, tmp_path / "best", None, sampling=sampling)
    expected = generate_answers(
        model,
        tokenizer,
        [alpaca_prompt(question) for question in QUESTIONS],
        settings=sampling,
        seed=1,
        max_prompt_length=200,
    )
    assert expected[0].num_tokens <= 6 and not expected[0].truncated, "EOS must end one of them"
    answer = pipeline("text-generation", model=str(tmp_path / "best"))
    for question, own in zip(QUESTIONS, expected, strict=True):
        messages = answer([{"role": "user", "content": question}])[0]["generated_text"]
        assert messages[-1] == {"role": "assistant", "content": own.text}


# --- Trained, exported, evaluated ---------------------------------------------------------------


def scores(workspace: Workspace, model: Path, out: str) -> list[Any]:
    folder = workspace.root / out
    argv = ["--checkpoint", str(model), "--data_dir", str(workspace.root / "data")]
    argv += ["--sets", "[toy]", "--output_dir", str(folder), "--eval.seeds", "[1, 2]"]
    argv += ["--eval.max_new_tokens", "8", "--max_prompt_length", "110"]
    assert evaluate.main(argv) == 0
    files = [folder / f"seed{seed}/toy/results.json" for seed in (1, 2)]
    samples = [file.with_name("samples.jsonl").read_text() for file in files]
    return [[json.loads(file.read_text())["metrics"] for file in files], samples]


def test_an_export_is_the_run_s_model_and_tells_of_it(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace.root)
    run = workspace.root / "results/train/toy"
    for name in ("student", "teacher", "data/toy"):
        (workspace.root / name / "README.md").write_text("---\nlicense: mit\n---\n")
    assert main(workspace.flags(out="results/train/toy")) == 0
    own = scores(workspace, run / "best", "results/eval_main/toy")
    exported = workspace.root / "exported"
    assert command(["export", str(run), "--to", str(exported)]) == 0
    # The last step is the best of so short a run: one model, two ways out.
    assert checkpoint_fingerprint(str(exported)) == checkpoint_fingerprint(str(run / "latest"))
    assert scores(workspace, exported, "again") == scores(workspace, run / "latest", "latest")
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    dev = {line["step"]: line["eval/dev/loss"] for line in lines if "eval/dev/loss" in line}
    best = min(dev, key=lambda step: dev[step])
    for folder, step in ((run / "best", best), (run / "latest", 8), (exported, 8)):
        card = ModelCard.load(folder / "README.md")
        assert f"| optimizer steps | {step} of 8 |" in card.text
        assert f"| Loss (nats per token) | {dev[step]:.6g} |" in card.text
        assert card.data.license == "mit"
        assert str(workspace.root) not in card.content
        assert "student taught by teacher" in card.text
    assert command(["card", str(run / "best")]) == 0
    mean = (own[0][0]["rougeL"] + own[0][1]["rougeL"]) / 2
    assert f"| toy | Rouge-L | {mean:.2f} ± " in (run / "best/README.md").read_text()
    assert scores(workspace, run / "best", "results/eval_main/toy") == own  # still the same model


def test_cards_of_a_resumed_run_are_those_of_a_straight_one(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(workspace.flags(out="straight")) == 0
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        assert main(workspace.flags(out="run")) == 143
    assert main(workspace.flags(out="run")) == 0
    for model in ("latest", "best", "state/step-8/student"):
        folders = [workspace.root / out / model for out in ("straight", "run")]
        one, other = ({p.name: p.read_bytes() for p in f.iterdir()} for f in folders)
        assert one.keys() == other.keys() and "README.md" in one
        assert one == other


# --- To the hub ---------------------------------------------------------------------------------


@dataclass
class Hub:
    """What the server was told, and how it answers."""

    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    commits: list[str] = field(default_factory=list)
    private: bool = False
    fail: dict[str, list[int]] = field(default_factory=dict)
    """Part of a path → the status codes of its next answers."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Hub, HfApi]]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *arguments: Any) -> None:
            """Says nothing."""

        def answer(self, content: Any, status: int = 200) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def refused(self) -> bool:
            state.requests.append(f"{self.command} {self.path}")
            state.tokens.add(self.headers.get("Authorization"))
            for part, codes in state.fail.items():
                if part in self.path and codes:
                    url = f"http://{self.headers['Host']}/me/small"
                    problem = [{"message": "license is not one of ours"}]
                    self.answer({"error": "no", "url": url, "errors": problem}, codes.pop(0))
                    return True
            return False

        def do_GET(self) -> None:
            if not self.refused():
                self.answer({"id": "me/small", "private": state.private, "siblings": []})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.refused():
                return
            if self.path.endswith("/repos/create"):
                state.private = json.loads(body).get("visibility") == "private"
                self.answer({"url": f"http://{self.headers['Host']}/me/small"})
            elif "/branch/" in self.path or self.path.endswith("/validate-yaml"):
                self.answer({})
            elif "/preupload/" in self.path:
                names = [entry["path"] for entry in json.loads(body)["files"]]
                modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
                self.answer({"files": modes})
            else:
                lines = [json.loads(line) for line in body.splitlines()]
                state.commits.append(lines[0]["value"]["summary"])
                for line in lines[1:]:
                    state.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                url = f"http://{self.headers['Host']}/me/small/commit/1"
                self.answer({"commitUrl": url, "commitOid": "1", "pullRequestUrl": None})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    yield state, HfApi(endpoint=address, token=TOKEN)
    server.shutdown()
    server.server_close()


@pytest.fixture
def model(tmp_path: Path, tiny_gpt2: Callable[..., GPT2LMHeadModel], tiny_tokenizer: Any) -> Path:
    """An exported model with a card, and what must not leave the machine beside it."""
    folder = tmp_path / "best"
    write_model(tiny_gpt2(), tiny_tokenizer, folder, None)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (tmp_path / "secret.json").write_text("{}")
    (folder / "my_link.json").symlink_to(tmp_path / "secret.json")
    for name in ("optimizer.pt", "pytorch_model.bin", "log.txt", "notes.json", "rank-0.pkl"):
        (folder / name).write_text("not this")
    (folder / "state").mkdir()
    return folder


SENT = {
    *("README.md", "config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
}


def push(model: Path, api: HfApi, *more: str) -> int:
    return push_main([str(model), "me/small", *more], api=api)


def test_push_sends_what_belongs_to_a_model(
    hub: tuple[Hub, HfApi], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, api = hub
    assert push(model, api, "--private", "--revision", "v2", "--message", "Hello") == 0
    assert set(state.files) == SENT
    for name, content in state.files.items():
        assert content == (model / name).read_bytes(), name
    assert state.private and state.commits == ["Hello"]
    assert any("/commit/v2" in request for request in state.requests)
    assert state.tokens == {f"Bearer {TOKEN}"}
    said = "".join(capsys.readouterr())
    assert "7 files" in said and "uploaded: " in said and "pytorch_model.bin" in said
    assert TOKEN not in said


def test_a_dry_run_asks_nothing_of_the_hub(
    hub: tuple[Hub, HfApi], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, api = hub
    assert push(model, api, "--dry_run") == 0
    assert not state.requests and "nothing was uploaded" in capsys.readouterr().out


def test_a_public_repository_is_not_taken_for_a_private_one(
    hub: tuple[Hub, HfApi], model: Path
) -> None:
    state, api = hub
    state.fail = {"/repos/create": [409]}  # it is there already
    with pytest.raises(ConfigError, match="public"):
        push(model, api, "--private")
    assert not state.files


@pytest.mark.parametrize(
    ("place", "code", "kind", "said"),
    [
        ("/api/", 401, ConfigError, "HF_TOKEN"),
        ("/api/", 403, ConfigError, "right to write"),
        ("/preupload/", 404, ConfigError, "REPO_ID"),
        ("/validate-yaml", 400, ConfigError, "license is not one of ours"),
        ("/repos/create", 500, StorageError, "500"),
    ],
)
def test_refusals_are_told(
    hub: tuple[Hub, HfApi],
    model: Path,
    place: str,
    code: int,
    kind: type[UserError],
    said: str,
) -> None:
    state, api = hub
    state.fail = {place: [code] * 20}
    with pytest.raises(kind) as refusal:
        push(model, api)
    told = refusal.value.format()
    assert said in told and "untouched" in told and TOKEN not in told


def test_a_stopped_push_goes_on(hub: tuple[Hub, HfApi], model: Path) -> None:
    state, api = hub
    state.fail = {"/commit/": [400]}
    with pytest.raises(StorageError):
        push(model, api)
    assert not state.files
    assert push(model, api) == 0
    assert set(state.files) == SENT


def test_no_network_and_offline(
    hub: tuple[Hub, HfApi], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = HfApi(endpoint="http://127.0.0.1:9", token=TOKEN)
    with pytest.raises(StorageError, match="not reached"):
        push(model, nobody)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE"):
        push(model, hub[1])


def as_link(file: Path) -> None:
    """Moves a file away and puts a link to it in its place."""
    file.symlink_to(file.rename(file.parent.parent / f"blob-{file.name}"))


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (lambda f: as_link(f / "model.safetensors"), ConfigError, "safetensors is a link"),
        (lambda f: as_link(f / "tokenizer.json"), ConfigError, r"tokenizer\.json is a link"),
        (lambda f: (f / "vocab.json").symlink_to("gone"), ConfigError, "is a link"),
        (lambda f: (f / "README.md").unlink(), ConfigError, "distilllens card"),
        (
            lambda f: (f / "README.md").write_text("---\nlicense: unknown\n---\n"),
            ConfigError,
            "--licence",
        ),
        (lambda f: (f / "README.md").write_text("# No head\n"), ConfigError, "--licence"),
        (lambda f: (f / "README.md").write_text("---\na: [\n---\n"), ConfigError, "YAML"),
        (lambda f: (f / "config.json").unlink(), ConfigError, r"holds no config\.json"),
        (lambda f: (f / "model.safetensors").unlink(), CheckpointError, "read whole"),
        (
            lambda f: (f / "model.safetensors").write_bytes(
                (f / "model.safetensors").read_bytes()[:-1]
            ),
            CheckpointError,
            "read whole",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "model-00002-of-00002.safetensors"}}'
            ),
            CheckpointError,
            r"00002-of-00002\.safetensors is missing",
        ),
        (lambda f: (f.parent / "manifest.json").write_text("{}"), ConfigError, "saved state"),
    ],
)
def test_what_is_not_sent(
    hub: tuple[Hub, HfApi],
    model: Path,
    change: Callable[[Path], object],
    kind: type[UserError],
    said: str,
) -> None:
    state, api = hub
    change(model)
    with pytest.raises(kind, match=said):
        push(model, api)
    assert not state.requests


def test_an_unknown_licence_can_be_allowed(hub: tuple[Hub, HfApi], model: Path) -> None:
    state, api = hub
    (model / "README.md").write_text("---\nlicense: unknown\n---\n")
    assert push(model, api, "--allow_unknown_licence") == 0
    assert set(state.files) == SENT


def test_a_bad_name_is_refused(model: Path, hub: tuple[Hub, HfApi]) -> None:
    with pytest.raises(ConfigError, match="REPO_ID"):
        push_main([str(model), "a/b/c"], api=hub[1])
