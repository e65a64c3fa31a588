"""The lens report's numbers against dense float64 computations, sorting, bins by hand."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import Unigram
from torch.distributions import Categorical
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from distilllens.data.collate import Batch, collate
from distilllens.errors import ConfigError, DataError
from distilllens.layers import LayerPair
from distilllens.lens import LogitLens
from distilllens.lens_matrix import LensMap, LensRows, collect_rows
from distilllens.report.lens.files import study_document
from distilllens.report.lens.page import LEVELS, embedded_json, palette_css, render_lens_page
from distilllens.report.lens.readings import LensReadings, read_layers
from distilllens.report.lens.samples import (
    HeldOut,
    TextSample,
    answer_greedily,
    own_prompts,
    read_held_out,
)
from distilllens.report.lens.statistics import (
    STATISTICS,
    compute_statistics,
    expected_calibration_error,
)
from distilllens.report.lens.study import ModelFigures, Source, Study, StudySettings
from distilllens.report.lens.token_map import (
    SampleReadings,
    counterpart_table,
    counterparts,
    drawable,
    plot_token_map,
    shown_layers,
)
from distilllens.report.lens.token_text import TokenText, visible
from distilllens.report.style import LIGHT, figure_png, figure_svg

Gpt2 = Callable[..., GPT2LMHeadModel]
VOCABULARY = 300


def nothing(_rows: int) -> None:
    """Stands where no progress is shown."""


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    """Two batches, 4 + 7 + 2 + 5 = 18 response tokens, padded to different lengths."""
    generator = torch.Generator().manual_seed(0)

    def sample(prompt: int, response: int) -> dict[str, list[int]]:
        ids = torch.randint(1, VOCABULARY, (prompt + response,), generator=generator).tolist()
        return {"prompt_ids": ids[:prompt], "response_ids": ids[prompt:]}

    return [
        collate([sample(5, 4), sample(3, 7)], pad_id=0),
        collate([sample(9, 2), sample(1, 5)], pad_id=0),
    ]


def sharpened(model: Any) -> Any:
    """Scales a random model's matrices, so that its layers are sure of different tokens."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20.0 if parameter.ndim > 1 else 1.0)
    return model


def rows_of(model: torch.nn.Module, batches: list[Batch], max_tokens: int = 1000) -> LensRows:
    return collect_rows(LogitLens(model), batches, max_tokens=max_tokens)


def dense_logits(
    model: Any, norm: torch.nn.Module, batches: list[Batch]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The oracle's way: hidden_states of the whole batch, own norm and head, label positions."""
    per_layer: list[list[torch.Tensor]] = []
    targets = []
    with torch.no_grad():
        for batch in batches:
            output = model(
                input_ids=batch.input_ids_BT,
                attention_mask=batch.attention_mask_BT,
                output_hidden_states=True,
            )
            mask = batch.labels_BT[:, 1:] != -100
            targets.append(batch.labels_BT[:, 1:][mask])
            *middle, last = output.hidden_states[1:]
            logits = [model.lm_head(norm(hidden)) for hidden in middle] + [model.lm_head(last)]
            per_layer.append([values[:, :-1][mask][:, :VOCABULARY] for values in logits])
    return [torch.cat(parts) for parts in zip(*per_layer, strict=True)], torch.cat(targets)


def calibration_by_hand(confidences: list[float], hits: list[bool]) -> float:
    total = 0.0
    for number in range(15):
        inside = [i for i, c in enumerate(confidences) if number / 15 < c <= (number + 1) / 15]
        if inside:
            accuracy = sum(hits[i] for i in inside) / len(inside)
            confidence = sum(confidences[i] for i in inside) / len(inside)
            total += len(inside) / len(confidences) * abs(accuracy - confidence)
    return total


def test_statistics_equal_a_dense_float64_computation(
    tiny_gpt2: Gpt2, tiny_llama: Callable[..., LlamaForCausalLM], batches: list[Batch]
) -> None:
    """Depths 4 and 3, widths 32 and 48, and a teacher's head padded from 300 to 308 rows."""
    teacher = sharpened(tiny_gpt2(vocab=308, n_layer=4, seed=1)).double()
    student = sharpened(tiny_llama(n_embd=48, seed=2)).double()
    oracle = {
        "teacher": dense_logits(teacher, teacher.transformer.ln_f, batches),
        "student": dense_logits(student, student.model.norm, batches),
    }
    teacher_final = oracle["teacher"][0][-1].argmax(-1)
    for name, model in (("teacher", teacher), ("student", student)):
        readings = read_layers(
            rows_of(model, batches), vocabulary=VOCABULARY, chunk_rows=5, advance=nothing
        )
        statistics = compute_statistics(readings, teacher_final_N=teacher_final.numpy())
        assert set(statistics) == {statistic.key for statistic in STATISTICS}
        layers, targets = oracle[name]
        assert readings.num_tokens == len(targets) == 18
        assert readings.gold_N.tolist() == targets.tolist()
        for layer, logits in enumerate(layers):
            distribution = Categorical(logits=logits)
            order = logits.argsort(dim=-1, descending=True)
            ranks = (order == targets[:, None]).nonzero()[:, 1] + 1
            top = order[:, 0]
            hits = (top == targets).tolist()
            confidences = distribution.probs.max(-1).values.tolist()
            expected = {
                "entropy": distribution.entropy().mean(),
                "nll": -distribution.log_prob(targets).mean(),
                "own_agreement": (top == layers[-1].argmax(-1)).double().mean(),
                "teacher_agreement": (top == teacher_final).double().mean(),
                "accuracy": sum(hits) / 18,
                "calibration_error": calibration_by_hand(confidences, hits),
                "mean_rank": ranks.double().mean(),
                "median_rank": float(np.median(ranks.numpy())),
            }
            for key, value in expected.items():
                assert statistics[key][layer] == pytest.approx(float(value), abs=1e-9), key
            assert readings.top_LNK[layer].tolist() == order[:, :5].tolist()
            probs = distribution.probs.gather(1, order[:, :5])
            np.testing.assert_allclose(readings.prob_LNK[layer], probs, atol=1e-12)
        # The oracle says something: layers differ, and no number is the same everywhere.
        assert np.ptp(statistics["entropy"]) > 0.01


def test_last_layer_is_the_models_own_loss(tiny_gpt2: Gpt2, batches: list[Batch]) -> None:
    model = sharpened(tiny_gpt2())
    readings = read_layers(rows_of(model, batches), vocabulary=VOCABULARY, advance=nothing)
    with torch.no_grad():
        losses = [
            model(input_ids=batch.input_ids_BT, labels=batch.labels_BT).loss * batch.num_tokens
            for batch in batches
        ]
    statistics = compute_statistics(readings, teacher_final_N=readings.top_LNK[-1, :, 0])
    assert statistics["nll"][-1] == pytest.approx(float(sum(losses)) / 18, rel=1e-5)
    assert statistics["own_agreement"][-1] == statistics["teacher_agreement"][-1] == 1.0


def test_chunks_change_nothing_and_bound_the_logits(tiny_gpt2: Gpt2, batches: list[Batch]) -> None:
    model = sharpened(tiny_gpt2()).double()
    rows = rows_of(model, batches)
    sizes: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[0]))
    done: list[int] = []
    small = read_layers(rows, vocabulary=VOCABULARY, chunk_rows=4, advance=done.append)
    assert max(sizes) == 4 and sum(sizes) == sum(done) == 3 * 18
    whole = read_layers(rows, vocabulary=VOCABULARY, advance=nothing)
    np.testing.assert_allclose(small.entropy_LN, whole.entropy_LN, atol=1e-12)
    np.testing.assert_array_equal(small.rank_LN, whole.rank_LN)
    np.testing.assert_array_equal(small.top_LNK, whole.top_LNK)


def test_equal_logits_share_the_better_rank(tiny_gpt2: Gpt2, batches: list[Batch]) -> None:
    model = tiny_gpt2()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    readings = read_layers(rows_of(model, batches), vocabulary=VOCABULARY, advance=nothing)
    assert (readings.rank_LN == 1).all()
    np.testing.assert_allclose(readings.entropy_LN, math.log(VOCABULARY), rtol=1e-6)


def test_rows_carry_the_tokens_that_they_predict(tiny_gpt2: Gpt2, batches: list[Batch]) -> None:
    every = torch.cat([batch.targets_N for batch in batches])
    rows = rows_of(tiny_gpt2(), batches, max_tokens=3)
    assert rows.targets_N.tolist() == [int(every[0]), int(every[8]), int(every[17])]  # 8.5: even


def test_calibration_error_by_hand() -> None:
    # Bin (12/15, 13/15]: 0.85 and 0.86, one of two right; bin (0, 1/15]: 0.05, wrong.
    confidence = np.array([0.85, 0.86, 0.05])
    hit = np.array([True, False, False])
    expected = 2 / 3 * abs(0.5 - 0.855) + 1 / 3 * 0.05
    assert expected_calibration_error(confidence, hit) == pytest.approx(expected)
    # A bin holds its upper edge: 1/3 = 5/15 is in the fifth bin, 0.34 in the sixth.
    edge = np.array([1 / 3, 0.34])
    apart = (1 - 1 / 3 + 0.34) / 2
    assert expected_calibration_error(edge, np.array([True, False])) == pytest.approx(apart)
    assert expected_calibration_error(np.ones(4), np.ones(4, dtype=bool)) == 0.0


def test_calibration_error_equals_scikit_learns_bins() -> None:
    calibration = pytest.importorskip("sklearn.calibration")
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.001, 1.0, 500)
    hit = generator.uniform(size=500) < confidence**2
    accuracy, mean = calibration.calibration_curve(hit, confidence, n_bins=15, strategy="uniform")
    counts, _ = np.histogram(confidence, bins=15, range=(0.0, 1.0))
    expected = (counts[counts > 0] / 500 * np.abs(accuracy - mean)).sum()
    assert expected > 0.1
    assert expected_calibration_error(confidence, hit) == pytest.approx(expected)


def test_greedy_answer_is_that_of_generate(tiny_gpt2: Gpt2) -> None:
    model = sharpened(tiny_gpt2(seed=3))
    prompt = [5, 17, 200, 31]
    expected = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=0, pad_token_id=0
    )[0, 4:].tolist()
    assert answer_greedily(LogitLens(model), prompt, limit=12, eos=0) == expected
    stop = expected[2]
    cut = expected[: expected.index(stop) + 1]
    assert answer_greedily(LogitLens(model), prompt, limit=12, eos=stop) == cut


# --- Text ---------------------------------------------------------------------------------------


def test_invisible_text_is_shown() -> None:
    assert visible(" a\n\tb") == "·a⏎⇥b"
    assert visible("\u202eabc") == "‹202E›abc"  # from right to left
    assert visible("\u200b\x00\xa0\ue000") == "‹200B›‹0000›‹00A0›‹E000›"
    assert visible("</script> é 中 א") == "</script>·é·中·א"
    assert visible("\u0301") == "◌\u0301"


def test_byte_level_tokens(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    text_of = TokenText(tiny_tokenizer)
    [line_break] = tiny_tokenizer("\n")["input_ids"]
    assert text_of(line_break) == "⏎"
    assert text_of(tiny_tokenizer.eos_token_id) == "<|endoftext|>"
    assert text_of(1000) == "‹id 1000›"
    ids = tiny_tokenizer("😀")["input_ids"]
    shown = "".join(text_of(index) for index in ids)
    assert re.sub(r"[‹› ]", "", shown) == "😀".encode().hex().upper()
    every = [text_of(index) for index in range(len(tiny_tokenizer))]
    assert all(every) and not any(set(text) & set(" \n\t\ufffd\u202e") - {" "} for text in every)
    # Together they are the text again.
    text = "The quick brown fox.\n"
    joined = "".join(text_of(index) for index in tiny_tokenizer(text)["input_ids"])
    assert joined.replace("·", " ").replace("⏎", "\n") == text


def test_sentencepiece_tokens() -> None:
    pieces = [("<unk>", 0.0), ("▁hello", -1.0), ("lo", -2.0), ("▁", -3.0), ("<0xF0>", -9.0)]
    backend = Tokenizer(Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    text_of = TokenText(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    assert [text_of(i) for i in range(5)] == ["<unk>", "·hello", "lo", "·", "‹F0›"]


def test_records_are_read_as_training_reads_them(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [
        {"instruction": "Sort: b a", "output": "a b"},
        {"instruction": "Say nothing.", "output": " "},
        {"instruction": "Sort the words. " * 30, "output": "too long a prompt"},
        {"instruction": "Say yes.", "output": ["yes", "Yes."]},
        {"instruction": "Go on.", "output": "and on and", "truncated": True},
    ]
    path = tmp_path / "valid.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    limits = {"max_length": 200, "max_prompt_length": 150}
    held_out = read_held_out(path, tiny_tokenizer, count=5, **limits)
    assert [sample.title for sample in held_out.samples] == ["Record 1", "Record 4", "Record 5"]
    assert (held_out.num_records, held_out.num_left_out) == (5, 2)
    eos = tiny_tokenizer.eos_token_id
    ends = [sample.response_ids[-1] == eos for sample in held_out.samples]
    assert ends == [True, True, False]
    assert [sample.cut for sample in held_out.samples] == [False, False, True]
    assert held_out.samples[1].response_ids == (*tiny_tokenizer("yes")["input_ids"], eos)
    with pytest.raises(DataError, match="none of the first 2 records"):
        read_held_out(path, tiny_tokenizer, count=2, max_length=60, max_prompt_length=3)


def test_own_prompts(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    limit = {"max_prompt_length": 100}
    [waiting] = own_prompts(tiny_tokenizer, ["Say yes."], [], **limit)
    assert waiting.prompt == "Say yes." and not waiting.response_ids
    [given] = own_prompts(tiny_tokenizer, ["Say yes."], ["yes"], **limit)
    assert given.answered_by == "given" and given.response_ids[-1] == tiny_tokenizer.eos_token_id
    with pytest.raises(ConfigError, match="2 × --prompt, but 1 × --response"):
        own_prompts(tiny_tokenizer, ["a", "b"], ["c"], **limit)
    with pytest.raises(ConfigError, match="--prompt 1 has"):
        own_prompts(tiny_tokenizer, ["word " * 200], [], **limit)
    with pytest.raises(ConfigError, match="--prompt 1"):
        own_prompts(tiny_tokenizer, [" "], [], **limit)


# --- Layers side by side ------------------------------------------------------------------------


def test_counterparts_without_pairs_stand_at_the_same_depth() -> None:
    assert counterparts(6, 3, []) == [1, 1, 2, 2, 3, 3]  # 0.5 → 1, 1.5 → 2, 2.5 → 3
    assert counterparts(3, 6, []) == [2, 4, 6]
    assert counterparts(4, 4, []) == [1, 2, 3, 4]
    assert counterparts(48, 2, [])[0] == 1 and counterparts(48, 2, [])[-1] == 2


def test_counterparts_of_paired_layers_are_their_partners() -> None:
    # SmolLM2's run: teacher 4 10 16 22 25 of 30, student 2 4 6 8 9 of 10.
    pairs = [(4, 2), (10, 4), (16, 6), (22, 8), (25, 9)]
    forward = counterparts(30, 10, pairs)
    assert [forward[teacher - 1] for teacher, _ in pairs] == [2, 4, 6, 8, 9]
    assert forward[12] == 5  # 13 lies halfway between 10 and 16
    assert forward[-1] == 10 and forward == sorted(forward)
    table = counterpart_table([30, 10, 10], [LayerPair(t, s) for t, s in pairs])
    assert table[0][1] == forward and table[0][0] == list(range(1, 31))
    assert [table[1][0][student - 1] for _, student in pairs] == [4, 10, 16, 22, 25]
    assert table[1][2] == list(range(1, 11))


def test_static_maps_keep_the_last_layer() -> None:
    assert shown_layers(6) == [6, 5, 4, 3, 2, 1]
    assert shown_layers(48) == list(range(48, 0, -3))
    assert len(shown_layers(30)) <= 16 and shown_layers(30)[0] == 30


# --- The page -----------------------------------------------------------------------------------


def fabricated_study(
    depths: tuple[int, ...], *, tokens: int, samples: int, text: str = "token{}"
) -> Study:
    """A study of random numbers, as large as asked for."""
    generator = np.random.default_rng(0)

    def readings(layers: int) -> LensReadings:
        shape = (layers, tokens)
        prob = np.sort(generator.dirichlet(np.ones(6), size=shape)[..., :5])[..., ::-1]
        return LensReadings(
            entropy_LN=generator.uniform(0, 11, shape),
            nll_LN=generator.uniform(0, 12, shape),
            rank_LN=generator.integers(1, 150_000, shape),
            top_LNK=generator.integers(0, 150_000, (*shape, 5)),
            prob_LNK=prob,
            gold_N=generator.integers(0, 150_000, tokens),
        )

    roles = ("teacher", "student", "before")[: len(depths)]
    sample = TextSample(
        title="Record 1",
        prompt=text,
        answered_by="reference",
        prompt_ids=(1, 2),
        response_ids=tuple(range(tokens)),
    )
    lens_map = LensMap(
        divergence_ST=generator.uniform(0, 0.69, (depths[1], depths[0])),
        student_entropy_S=np.ones(depths[1]),
        teacher_entropy_T=np.ones(depths[0]),
        num_tokens=512,
        num_available=1000,
    )
    figures = [readings(depth) for depth in depths]
    final = figures[0].top_LNK[-1, :, 0]
    settings = StudySettings(
        sources=tuple(Source(role=role, path=role) for role in roles),
        pairs=(LayerPair(2, 1),),
        data=Path("valid.jsonl"),
        prompts=64,
        tokens=512,
        show=samples,
        show_tokens=tokens,
        answers="reference",
        own_prompts=(),
        own_responses=(),
        max_length=512,
        max_prompt_length=256,
        device="cpu",
        dtype=torch.float32,
        attention="auto",
    )
    return Study(
        models=tuple(
            ModelFigures(
                role=role,
                path=f"checkpoints/{text.format(role)}",
                num_layers=depth,
                vocab_rows=150_000,
                statistics=compute_statistics(read, teacher_final_N=final),
            )
            for role, depth, read in zip(roles, depths, figures, strict=True)
        ),
        after=lens_map,
        before=lens_map if len(depths) > 2 else None,
        pairs=settings.pairs,
        samples=tuple(
            SampleReadings(
                sample=sample, answer=text, readings=tuple(readings(depth) for depth in depths)
            )
            for _ in range(samples)
        ),
        held_out=HeldOut(samples=(sample,), num_records=1, num_left_out=0),
        vocabulary=150_000,
        text_of=lambda index: text.format(index),
        settings=settings,
    )


def test_a_large_page_stays_small() -> None:
    """3 answers × 64 tokens × 3 models × 48 layers, each cell with five different tokens."""
    study = fabricated_study((48, 48, 48), tokens=64, samples=3)
    page = render_lens_page(study, study_document(study), footer="")
    size = len(page.encode())
    assert 1_000_000 < size < 5_000_000


def test_hostile_text_cannot_leave_its_place() -> None:
    attack = "</script><script>run({})</script><img src=x onerror=run()>&amp;\u2028"
    study = fabricated_study((2, 2), tokens=2, samples=1, text=attack.replace("{}", "1"))
    document = study_document(study)
    page = render_lens_page(study, document, footer=attack)
    assert "<script>run" not in page and "<img" not in page
    assert page.count("<script") == 2 and page.count("</script>") == 2
    [data] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert json.loads(data) == json.loads(json.dumps(document))
    assert embedded_json({"a": "<&>\u2028\ud83d"}) == (
        r'{"a":"\u003c\u0026\u003e\u2028\ud83d"}'  # ASCII only, half an emoji included
    )


def test_only_this_script_may_run() -> None:
    study = fabricated_study((3, 2), tokens=2, samples=1)
    page = render_lens_page(study, study_document(study), footer="")
    [script] = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none';")
    assert f"script-src 'sha256-{digest}'" in policy
    for outside in ("http://", "https://", "url(", "@import", "innerHTML", "eval("):
        # SVG and XHTML elements are made by the names of their namespaces.
        assert outside not in page.replace("http://www.w3.org/", "")
    assert not re.search(r"\son[a-z]+=", page)


def test_document_names_every_number_once() -> None:
    study = fabricated_study((4, 2, 2), tokens=3, samples=1)
    document = study_document(study)
    assert [model["role"] for model in document["models"]] == ["teacher", "student", "before"]
    np.testing.assert_allclose(
        document["divergence"]["after"], study.after.divergence_ST, rtol=1e-6
    )
    shown, read = document["samples"][0]["maps"][1], study.samples[0].readings[1]
    assert document["tokens"][shown["top"][1][2][0]] == f"token{read.top_LNK[1, 2, 0]}"
    assert shown["top_probability"][1][2][0] == round(10_000 * read.prob_LNK[1, 2, 0])
    assert shown["rank"] == read.rank_LN.tolist()


def test_text_is_readable_on_every_colour() -> None:
    css = palette_css()

    def colours(name: str) -> list[tuple[str, ...]]:
        found = re.findall(rf"--{name}(\d+):light-dark\((#\w+),(#\w+)\)", css)
        assert [int(number) for number, *_ in found] == list(range(LEVELS))
        return [pair for _, *pair in found]

    def luminance(colour: str) -> float:
        parts = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)
        ]
        return float(np.dot(parts, [0.2126, 0.7152, 0.0722]))

    for surfaces, inks in zip(colours("s"), colours("i"), strict=True):
        for surface, ink in zip(surfaces, inks, strict=True):
            dark, light = sorted((luminance(surface), luminance(ink)))
            assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_static_token_map_draws_any_text_and_is_reproducible() -> None:
    attack = "$\\frac{}$ 中 𓀀 \u202e"  # mathtext, and characters that the font lacks
    study = fabricated_study((20, 4), tokens=6, samples=1, text=attack.replace("{}", ""))

    def draw() -> tuple[bytes, bytes]:
        figure = plot_token_map(
            study.samples[0],
            labels=["Teacher", "Student"],
            text_of=lambda index: visible(attack),
            largest=11.0,
            theme=LIGHT,
        )
        return figure_png(figure), figure_svg(figure)

    (png, svg), again = draw(), draw()
    assert (png, svg) == again
    assert png.startswith(b"\x89PNG") and b"<svg" in svg
    assert drawable("a𓀀b", 9) == "a□b" and drawable("abcdef", 4) == "abc…"
