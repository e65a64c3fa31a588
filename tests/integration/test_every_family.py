"""Every model family through the whole way: lens, loss, training, export, reload, evaluation.

With ``-s`` it prints the table of docs/families.md at its end.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workspace, build_bpe, write_records
from model_zoo import FAMILIES, Size, build
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import evaluate
import train
from distilllens import session
from distilllens.config import ObjectiveConfig
from distilllens.families import find_parts
from distilllens.layers import LayerPair
from distilllens.lens import LogitLens
from distilllens.objective import DistillationObjective
from distilllens.runtime.libraries import quiet_libraries
from distilllens.student import DistillationModule, Teacher
from distilllens.training.setup import build_module

STUDENT = Size(vocab=300, width=16, blocks=3, positions=160)
TEACHER = Size(vocab=300, width=32, blocks=5, positions=160)
PAIRS = [LayerPair(teacher=2, student=1), LayerPair(teacher=4, student=2)]
RATIO = 0.5
PROMPT, SHORT, LONG = 4, 9, 12
"""Tokens of a prompt, and of the two records of a batch."""
BLOCKS_IN_PARALLEL = {"gptj", "gpt_neox", "phi", "cohere", "falcon"}
"""Attention and MLP read the same input."""
ERRORS: dict[str, float] = {}
"""Of the self-check, in float32: the larger of student and teacher, by family."""
SECONDS: dict[str, float] = defaultdict(float)
"""Processor time of all tests of a family."""


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    rates = {k: 0.0 for k, v in model.config.to_dict().items() if "drop" in k and type(v) is float}
    model.config.update(rates)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A student of one family and a deeper and wider teacher, 8 records and 3 for tests."""
    root = tmp_path_factory.mktemp(request.param)
    save_pair(root, request.param, STUDENT, TEACHER)
    write_records(root / "data/toy/raw.jsonl", 8)
    write_records(root / "data/toy/valid.jsonl", 3, seed=1)
    return Workspace(root)


@pytest.fixture(autouse=True)
def timed(request: pytest.FixtureRequest) -> Iterator[None]:
    start = time.process_time()
    yield
    if "place" in request.fixturenames:
        SECONDS[request.node.callspec.params["place"]] += time.process_time() - start


def save_pair(root: Path, family: str, student: Size, teacher: Size) -> None:
    quiet_libraries()
    for seed, (name, size) in enumerate((("student", student), ("teacher", teacher))):
        without_dropout(build(family, size, seed)).save_pretrained(root / name)
        build_bpe().save_pretrained(root / name)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    config = AutoConfig.from_pretrained(folder)
    config._experts_implementation = "eager"  # the others know no float64
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype).eval()


def token_ids(size: int, seed: int) -> Tensor:
    return torch.randint(1, 300, (1, size), generator=torch.Generator().manual_seed(seed))


# --- The oracle: dense, float64, the model's own code alone -------------------------------------


class CutOff:
    """A model that ends after some block, with the weights of the whole one.

    What it says is the logit lens by its definition: the model's own norm, head and all that comes
    behind, in its own code. Gradients reach the whole model.
    """

    def __init__(self, folder: Path, model: Any, layer: int) -> None:
        config = AutoConfig.from_pretrained(folder, num_hidden_layers=layer)
        config._experts_implementation = "eager"
        for name in ("layer_types", "no_rope_layers"):
            if getattr(config, name, None):
                setattr(config, name, getattr(config, name)[:layer])
        if config.model_type == "minicpm3":  # each residual is divided by √num_hidden_layers
            config.scale_depth *= (layer / model.config.num_hidden_layers) ** 0.5
        self.model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
        whole = model.state_dict(keep_vars=True)
        self.weights = {name: whole[name] for name in self.model.state_dict()}
        assert len(self.weights) < len(whole)

    def __call__(self, ids_BT: Tensor) -> Tensor:
        inputs = {"input_ids": ids_BT, "use_cache": False}
        logits = functional_call(self.model, self.weights, (), inputs).logits
        assert isinstance(logits, Tensor)
        return logits


def dense_loss(root: Path, student: Any, teacher: Any, records: list[tuple[int, Tensor]]) -> Tensor:
    """Returns the loss of records (prompt tokens, ids), each computed alone, in float64."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    student_cuts = [CutOff(root / "student", student, pair.student) for pair in PAIRS]
    teacher_cuts = [CutOff(root / "teacher", teacher, pair.teacher) for pair in PAIRS]
    for start, ids in records:

        def log_probs(logits: Tensor, start: int = start) -> Tensor:
            return logits[0, start - 1 : -1, : STUDENT.vocab].log_softmax(-1)

        q, q_lens = (
            log_probs(student(input_ids=ids).logits),
            [log_probs(c(ids)) for c in student_cuts],
        )
        with torch.no_grad():
            p, p_lens = (
                log_probs(teacher(input_ids=ids).logits),
                [log_probs(c(ids)) for c in teacher_cuts],
            )
        lens = [
            (x.exp() * (x - ((p_k.exp() + q_k.exp()) / 2).log())).sum() / 2
            for p_k, q_k in zip(p_lens, q_lens, strict=True)
            for x in (p_k, q_k)
        ]
        cross_entropy = -q.gather(1, ids[0, start:, None]).sum()
        reverse = (q.exp() * (q - p)).sum()
        total = total + (1 - RATIO) * cross_entropy
        total = total + RATIO * (reverse + torch.stack(lens).sum() / len(PAIRS))
        tokens += ids.shape[1] - start
    return total / tokens


# --- Lens and loss ------------------------------------------------------------------------------


def test_lens_of_a_middle_layer_is_the_model_cut_off_there(
    place: Workspace, request: pytest.FixtureRequest
) -> None:
    family = request.node.callspec.params["place"]
    for role, layer in (("student", 2), ("teacher", 3)):
        model = load(place.root / role)
        lens, ids = LogitLens(model), token_ids(9, seed=3)
        error = lens.self_check(ids)
        assert error < 1e-5
        ERRORS[family] = max(ERRORS.get(family, 0.0), error)
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
            actual = lens.logits(states[layer]).double()
            expected = CutOff(place.root / role, model.double(), layer)(ids)
        scale = expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * scale)


def test_loss_and_gradient_are_the_dense_ones(place: Workspace) -> None:
    """The batch is padded; the oracle takes each record alone."""
    records = [(PROMPT, token_ids(SHORT, seed=1)), (PROMPT, token_ids(LONG, seed=2))]
    ids_BT = torch.full((2, LONG), 7)
    ids_BT[0, :SHORT], ids_BT[1] = records[0][1][0], records[1][1][0]
    positions = [*range(PROMPT - 1, SHORT - 1), *range(LONG + PROMPT - 1, 2 * LONG - 1)]
    rows_N = torch.tensor(positions)
    targets_N = ids_BT.flatten()[rows_N + 1]

    student = load(place.root / "student")
    teacher = Teacher(LogitLens(load(place.root / "teacher").requires_grad_(False)), [2, 4])
    module = DistillationModule(
        student,
        objective=DistillationObjective(ObjectiveConfig(kd_ratio=RATIO), PAIRS),
        lens=LogitLens(student),
        teacher_unembedding=teacher.unembedding(),
        vocab_size=300,
    ).train()
    teacher_rows = teacher.rows(ids_BT, rows_N)
    loss, _ = module(ids_BT, rows_N, targets_N, teacher_rows, scale=1 / len(positions))
    loss.backward()

    exact = load(place.root / "student", torch.float64)
    expected = dense_loss(place.root, exact, load(place.root / "teacher", torch.float64), records)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in exact.named_parameters()}
    assert gradients.keys() == {name for name, _ in student.named_parameters()}
    largest = max(g.abs().max().item() for g in gradients.values() if g is not None)
    for name, parameter in student.named_parameters():
        wanted = gradients[name]
        if wanted is None:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        torch.testing.assert_close(
            parameter.grad.double(), wanted, rtol=1e-3, atol=1e-5 * largest, msg=name
        )


# --- Training, export, evaluation ---------------------------------------------------------------


def flags(place: Workspace, *more: str, out: str = "run") -> list[str]:
    """Returns one step over all six training records."""
    return place.flags(
        *("--optim.micro_batch_size", "6", "--optim.max_steps", "1", "--optim.lr", "1e-2"),
        *("--eval.dev_size", "2", "--tracking.log_every", "1", "--model.dtype", "float32"),
        *("--objective.kd_ratio", str(RATIO)),
        *("--objective.lens.teacher_layers", "[2, 4]", "--objective.lens.student_layers", "[1, 2]"),
        *more,
        out=out,
    )


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[DistillationModule]]:
    """The modules that `train.main` trains in a test."""
    modules: list[DistillationModule] = []

    def build_and_keep(*arguments: Any) -> DistillationModule:
        modules.append(build_module(*arguments))
        return modules[-1]

    monkeypatch.setattr(session, "build_module", build_and_keep)
    yield modules


def training_records(place: Workspace) -> list[tuple[int, Tensor]]:
    from datasets import load_from_disk

    samples = load_from_disk(str(place.root / "tokens/train"))
    return [
        (len(s["prompt_ids"]), torch.tensor([s["prompt_ids"] + s["response_ids"]])) for s in samples
    ]


def greedy(model: Any, ids: Tensor, length: int, eos: int) -> list[int]:
    """Returns the likeliest tokens one by one, without cache or padding."""
    start = ids.shape[1]
    for _ in range(length):
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == eos:
            break
    return [token for token in ids[0, start:].tolist() if token != eos]


def test_trained_exported_and_evaluated(
    place: Workspace, trained: list[DistillationModule]
) -> None:
    assert train.main(flags(place)) == 0
    first = metrics(place.root / "run")[0]
    student, teacher = (load(place.root / n, torch.float64) for n in ("student", "teacher"))
    with torch.no_grad():
        expected = dense_loss(place.root, student, teacher, training_records(place))
    assert first["train/loss"] == pytest.approx(expected.item(), rel=1e-5)

    exported = load(place.root / "run/latest")
    assert type(exported) is type(student)
    ids = token_ids(12, seed=5)
    with torch.no_grad():
        logits = exported(input_ids=ids).logits
        assert torch.equal(logits, trained[0].student.eval()(input_ids=ids).logits)
        assert not torch.allclose(logits.double(), student(input_ids=ids).logits, atol=1e-3)

    settings = ("--eval.do_sample", "false", "--eval.max_new_tokens", "4", "--eval.seeds", "[1]")
    scored = evaluate.main(
        [
            *("--checkpoint", f"{place.root}/run/latest", "--data_dir", f"{place.root}/data"),
            *("--sets", "[toy]", "--output_dir", f"{place.root}/scores", *settings),
            *("--eval.no_repeat_ngram_size", "0", "--max_prompt_length", "140"),
        ]
    )
    assert scored == 0
    lines = (place.root / "scores/seed1/toy/samples.jsonl").read_text().splitlines()
    tokenizer: Any = AutoTokenizer.from_pretrained(place.root / "run/latest")
    assert len(lines) == 3
    for sample in map(json.loads, lines):
        prompt = tokenizer(sample["prompt"], return_tensors="pt").input_ids
        answer = greedy(exported, prompt, 4, tokenizer.eos_token_id)
        assert sample["answer"].strip() == tokenizer.decode(answer).strip()


# --- Pairs that differ --------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> Workspace:
    """As `place`, of Llama models, the teacher's vocabulary padded to 320 rows."""
    save_pair(tmp_path, "llama", STUDENT, dataclasses.replace(TEACHER, vocab=320))
    write_records(tmp_path / "data/toy/raw.jsonl", 8)
    return Workspace(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_teacher_of_another_width_depth_dtype_and_vocabulary(
    pair: Workspace, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(flags(pair, "--model.teacher_dtype", dtype)) == 0
    assert "teacher vocabulary 320 cut to 300 (padding, no tokens)" in capsys.readouterr().out
    teacher = load(pair.root / "teacher", getattr(torch, dtype)).double()  # rounded alike
    with torch.no_grad():
        student = load(pair.root / "student", torch.float64)
        expected = dense_loss(pair.root, student, teacher, training_records(pair)).item()
    actual = metrics(pair.root / "run")[0]["train/loss"]
    assert actual == pytest.approx(expected, rel=1e-5 if dtype == "float32" else 1e-2)
    assert load(pair.root / "run/latest").lm_head.weight.shape == (300, 16)


def save_adapter(base: Path, folder: Path) -> Any:
    """Writes an adapter that says something, and returns the adapted model in float64."""
    torch.manual_seed(4)
    settings = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(load(base), settings)
    adapted.save_pretrained(str(folder))
    return adapted.merge_and_unload().double().eval()


@pytest.mark.parametrize("adapters", ["student", "teacher", "student teacher"])
def test_adapters(pair: Workspace, trained: list[DistillationModule], adapters: str) -> None:
    root, more = pair.root, []
    teacher = load(root / "teacher", torch.float64)
    if "teacher" in adapters:
        plain, teacher = teacher, save_adapter(root / "teacher", root / "adapter")
        assert not torch.equal(plain(token_ids(5, 1)).logits, teacher(token_ids(5, 1)).logits)
        more = ["--model.teacher_lora", f"{root}/adapter"]
    if "student" in adapters:
        more += ["--model.student_lora.r", "4", "--model.student_lora.alpha", "16"]
    assert train.main(flags(pair, *more, "--optim.max_steps", "2")) == 0

    student = load(root / "student", torch.float64)
    with torch.no_grad():  # a new adapter says nothing, so the first loss is the plain student's
        expected = dense_loss(root, student, teacher, training_records(pair)).item()
    assert metrics(root / "run")[0]["train/loss"] == pytest.approx(expected, rel=1e-5)

    exported, plain = (
        load_file(root / name / "model.safetensors") for name in ("run/latest", "student")
    )
    assert {n: t.shape for n, t in exported.items()} == {n: t.shape for n, t in plain.items()}
    changed = {name for name in plain if not torch.equal(plain[name], exported[name])}
    layers = {name for name in plain if ".layers." in name and "norm" not in name}
    assert changed == (layers if "student" in adapters else set(plain))
    ids, model = token_ids(12, seed=5), load(root / "run/latest")
    with torch.no_grad():
        adapted = trained[0].student.eval()(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, adapted, rtol=1e-4, atol=1e-4)
        before = student(input_ids=ids).logits.float()
    assert not torch.allclose(model(input_ids=ids).logits, before, atol=1e-2)


# --- The table ----------------------------------------------------------------------------------


def notes(family: str) -> str:
    """Returns what is special in the way from the last block to the logits."""
    model = build(family)
    parts = find_parts(model)
    transform = parts.transform
    special = {
        "head tied": model.get_input_embeddings().weight is parts.head.weight,
        "head bias": parts.head.bias is not None,
        "soft cap": transform is not None and transform.softcap is not None,
        "scaled logits": transform is not None and transform.scale != 1.0,
        "no final norm": isinstance(parts.final_norm, nn.Identity),
        "projection before the head": not isinstance(parts.project_out, nn.Identity),
        "attention and MLP in parallel": family in BLOCKS_IN_PARALLEL,
        "experts": any("Experts" in type(module).__name__ for module in model.modules()),
    }
    return ", ".join(name for name, holds in special.items() if holds)


def test_table() -> None:
    print("\n\n| family | self-check error | seconds | notes |\n|---|---|---|---|")
    for family in ERRORS:
        print(f"| {family} | {ERRORS[family]:.1g} | {SECONDS[family]:.1f} | {notes(family)} |")
    assert max(ERRORS.values(), default=0.0) < 1e-5
