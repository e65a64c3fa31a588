"""The lens map against torch.distributions, and what it must not depend on."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from distilllens import lens_matrix
from distilllens.data.collate import Batch, collate
from distilllens.divergence import DivergenceOptions, divergence
from distilllens.families import run_body
from distilllens.layers import LayerPair
from distilllens.lens import LogitLens
from distilllens.lens_matrix import (
    LensMap,
    LensRows,
    collect_rows,
    compute_lens_map,
    lens_divergences,
)
from distilllens.report.lens.plots import colour_limit, lens_panels, plot_lens_map
from distilllens.report.lens_map import entropy_csv, lens_map_csv
from distilllens.report.style import LIGHT, THEMES, figure_png

Gpt2 = Callable[..., GPT2LMHeadModel]


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    """Two batches, 4 + 7 + 2 + 5 = 18 response tokens, padded to different lengths."""
    generator = torch.Generator().manual_seed(0)

    def sample(prompt: int, response: int) -> dict[str, list[int]]:
        ids = torch.randint(1, 300, (prompt + response,), generator=generator).tolist()
        return {"prompt_ids": ids[:prompt], "response_ids": ids[prompt:]}

    return [
        collate([sample(5, 4), sample(3, 7)], pad_id=0),
        collate([sample(9, 2), sample(1, 5)], pad_id=0),
    ]


def sharpened(model: torch.nn.Module) -> torch.nn.Module:
    """Scales a random model's matrices, so that its layers speak of different tokens."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.ndim > 1 else 1.0)
    return model


def rows_of(model: torch.nn.Module, batches: list[Batch], max_tokens: int = 1000) -> LensRows:
    return collect_rows(LogitLens(model), batches, max_tokens=max_tokens)


def test_one_cell_and_entropies_equal_torch_distributions(
    tiny_gpt2: Gpt2, tiny_llama: Callable[..., LlamaForCausalLM], batches: list[Batch]
) -> None:
    teacher, student = tiny_gpt2(n_layer=4, seed=1).double(), tiny_llama(seed=2).double()
    sharpened(teacher), sharpened(student)
    lens_map = compute_lens_map(rows_of(teacher, batches), rows_of(student, batches))
    # The oracle goes its own way: hidden_states, label positions, torch.distributions.
    cells, teacher_entropies = [], []
    with torch.no_grad():
        for batch in batches:
            mask = batch.labels_BT[:, 1:] != -100
            inputs = {"input_ids": batch.input_ids_BT, "attention_mask": batch.attention_mask_BT}
            teacher_hidden = teacher(**inputs, output_hidden_states=True).hidden_states[2]
            student_hidden = student(**inputs, output_hidden_states=True).hidden_states[1]
            p_logits = teacher.lm_head(teacher.transformer.ln_f(teacher_hidden))[:, :-1][mask]
            q_logits = student.lm_head(student.model.norm(student_hidden))[:, :-1][mask]
            p, q = Categorical(logits=p_logits), Categorical(logits=q_logits)
            m = Categorical(probs=(p.probs + q.probs) / 2)
            cells.append((kl_divergence(p, m) + kl_divergence(q, m)) / 2)
            teacher_entropies.append(p.entropy())
    assert lens_map.divergence_ST.shape == (3, 4)
    assert lens_map.num_tokens == len(torch.cat(cells)) == 18
    assert lens_map.divergence_ST[0, 1] == pytest.approx(torch.cat(cells).mean().item(), abs=1e-9)
    entropy = torch.cat(teacher_entropies).mean().item()
    assert lens_map.teacher_entropy_T[1] == pytest.approx(entropy, abs=1e-9)


@pytest.mark.parametrize("beta", [0.5, 0.2])
def test_last_cell_is_the_divergence_of_the_models_own_predictions(
    tiny_gpt2: Gpt2, batches: list[Batch], beta: float
) -> None:
    teacher, student = tiny_gpt2(seed=1), tiny_gpt2(seed=2)
    sharpened(teacher)
    lens_map = compute_lens_map(rows_of(teacher, batches), rows_of(student, batches), beta=beta)
    values = []
    with torch.no_grad():
        for batch in batches:
            logits = [m(input_ids=batch.input_ids_BT).logits for m in (teacher, student)]
            p, q = (rows.flatten(0, 1)[batch.rows_N] for rows in logits)
            values.append(divergence("jsd", teacher_logits_NV=p, student_logits_NV=q, beta=beta))
    assert lens_map.divergence_ST[-1, -1] == pytest.approx(
        torch.cat(values).mean().item(), abs=1e-5
    )


def test_identical_models_have_a_zero_diagonal_and_a_symmetric_map(
    tiny_gpt2: Gpt2, batches: list[Batch]
) -> None:
    rows = rows_of(sharpened(tiny_gpt2(n_layer=4)), batches)
    lens_map = compute_lens_map(rows, rows)
    assert np.abs(np.diag(lens_map.divergence_ST)).max() < 1e-5
    np.testing.assert_allclose(lens_map.divergence_ST, lens_map.divergence_ST.T, atol=1e-5)
    np.testing.assert_array_equal(lens_map.student_entropy_S, lens_map.teacher_entropy_T)
    off_diagonal = lens_map.divergence_ST[~np.eye(4, dtype=bool)]
    assert off_diagonal.min() > 1e-3  # the map does tell layers apart
    assert off_diagonal.max() <= math.log(2)


def test_exchanging_the_models_transposes_the_map(tiny_gpt2: Gpt2, batches: list[Batch]) -> None:
    one = rows_of(tiny_gpt2(n_layer=2, seed=1), batches)
    two = rows_of(sharpened(tiny_gpt2(n_layer=4, seed=2)), batches)
    forth, back = compute_lens_map(one, two), compute_lens_map(two, one)
    np.testing.assert_allclose(forth.divergence_ST, back.divergence_ST.T, atol=1e-5)
    # Unequal weights are not symmetric, but exchange with their models.
    forth = compute_lens_map(one, two, beta=0.2)
    back = compute_lens_map(two, one, beta=0.2)
    assert np.abs(forth.divergence_ST - back.divergence_ST.T).max() > 1e-4
    back = compute_lens_map(two, one, beta=0.8)
    np.testing.assert_allclose(forth.divergence_ST, back.divergence_ST.T, atol=1e-5)


@pytest.mark.parametrize("chunk_rows", [1, 5, 18, 1000])
def test_chunks_do_not_change_the_map(
    tiny_gpt2: Gpt2, batches: list[Batch], chunk_rows: int
) -> None:
    teacher, student = rows_of(tiny_gpt2(seed=1), batches), rows_of(tiny_gpt2(seed=2), batches)
    whole = compute_lens_map(teacher, student)
    done: list[int] = []
    chunked = compute_lens_map(teacher, student, chunk_rows=chunk_rows, advance=done.append)
    np.testing.assert_allclose(chunked.divergence_ST, whole.divergence_ST, atol=2e-6)
    assert sum(done) == 18 and max(done) <= chunk_rows


def test_padding_does_not_change_the_rows(tiny_gpt2: Gpt2, batches: list[Batch]) -> None:
    model = tiny_gpt2()
    first = batches[0]
    alone = []
    for b in range(2):
        length = int(first.attention_mask_BT[b].sum())
        labels = first.labels_BT[b, :length]
        ids = first.input_ids_BT[b, :length].tolist()
        prompt = int((labels == -100).sum())
        alone.append(
            collate([{"prompt_ids": ids[:prompt], "response_ids": ids[prompt:]}], pad_id=7)
        )
    together, apart = rows_of(model, [first]), rows_of(model, alone)
    for left, right in zip(together.hidden_LND, apart.hidden_LND, strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-4)


def test_fewer_tokens_are_spread_evenly_and_are_the_same_for_all_models(
    tiny_gpt2: Gpt2, batches: list[Batch]
) -> None:
    model = tiny_gpt2()
    every, few = rows_of(model, batches), rows_of(model, batches, max_tokens=4)
    assert few.num_available == every.num_available == 18
    # 17 / 3 = 5.67 apart: 0, 6 (5.67), 11 (11.33), 17.
    torch.testing.assert_close(few.hidden_LND[1], every.hidden_LND[1][[0, 6, 11, 17]])


def test_padded_vocabulary_is_cut(tiny_gpt2: Gpt2, batches: list[Batch]) -> None:
    student = tiny_gpt2(vocab=300, seed=1)
    padded = tiny_gpt2(vocab=310, seed=2)
    plain = tiny_gpt2(vocab=300, seed=2)
    state = {
        name: value[:300] if value.shape[:1] == (310,) else value
        for name, value in padded.state_dict().items()
    }
    plain.load_state_dict(state)
    student_rows = rows_of(student, batches)
    expected = compute_lens_map(rows_of(plain, batches), student_rows)
    actual = compute_lens_map(rows_of(padded, batches), student_rows)
    np.testing.assert_allclose(actual.divergence_ST, expected.divergence_ST, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("jsd", DivergenceOptions()),
        ("jsd", DivergenceOptions(beta=0.2)),
        ("jsd", DivergenceOptions(top_k=5)),
        ("fkl+rkl", DivergenceOptions(fkl_coeff=0.5)),
        ("akl", DivergenceOptions(mu=0.3)),
    ],
)
def test_any_divergence_between_some_layers(
    tiny_gpt2: Gpt2, batches: list[Batch], kind: str, options: DivergenceOptions
) -> None:
    """Against the reference on whole logits, with a padded vocabulary and models of two widths."""
    teacher = sharpened(tiny_gpt2(n_layer=4, vocab=310, seed=1)).double()
    student = sharpened(tiny_gpt2(n_layer=5, n_embd=16, seed=2)).double()
    done: list[int] = []
    divergence_KT = lens_divergences(
        kind,
        options,
        teacher=rows_of(teacher, batches),
        student=collect_rows(LogitLens(student), batches, max_tokens=1000, layers=[2, 4]),
        advance=done.append,
    )
    assert divergence_KT.shape == (2, 4) and sum(done) == 18
    for k, t in ((0, 1), (1, 3)):
        values = []
        with torch.no_grad():
            for batch in batches:
                logits = []
                for model, layer in ((teacher, t), (student, (2, 4)[k])):
                    lens = LogitLens(model)
                    _, hidden = run_body(lens.parts, batch.input_ids_BT, [layer])
                    logits.append(lens.logits(hidden[layer]).flatten(0, 1)[batch.rows_N, :300])
                p, q = logits
                tuned = dataclasses.asdict(options)
                values.append(divergence(kind, teacher_logits_NV=p, student_logits_NV=q, **tuned))
        expected = torch.cat(values).mean().item()
        assert expected > 1e-3
        assert divergence_KT[k, t - 1] == pytest.approx(expected, abs=1e-9)


def test_many_rows_are_compared_in_chunks(
    tiny_gpt2: Gpt2, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [rows_of(sharpened(tiny_gpt2(seed=seed)), batches) for seed in (1, 2)]
    options = DivergenceOptions()
    whole = lens_divergences("fkl", options, teacher=rows[0], student=rows[1])
    monkeypatch.setattr(lens_matrix, "TERM_ROWS", 7)
    done: list[int] = []
    chunked = lens_divergences(
        "fkl", options, teacher=rows[0], student=rows[1], advance=done.append
    )
    assert done == [7, 7, 4]
    np.testing.assert_allclose(chunked, whole, rtol=1e-5)


def test_nothing_to_compare_is_an_error(tiny_gpt2: Gpt2, batches: list[Batch]) -> None:
    model = tiny_gpt2()
    empty = collate([{"prompt_ids": [1, 2, 3], "response_ids": []}], pad_id=0)
    with pytest.raises(ValueError, match="no response token"):
        rows_of(model, [empty])
    with pytest.raises(ValueError, match="teacher has 18 rows, student 4"):
        compute_lens_map(rows_of(model, batches), rows_of(model, batches, max_tokens=4))


def map_of(divergence_ST: list[list[float]]) -> LensMap:
    array = np.asarray(divergence_ST)
    return LensMap(
        divergence_ST=array,
        student_entropy_S=np.full(array.shape[0], 2.0),
        teacher_entropy_T=np.full(array.shape[1], 3.0),
        num_tokens=5,
        num_available=9,
    )


def test_paired_mean_and_csv_by_hand() -> None:
    before, after = map_of([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]), map_of([[0, 0, 0], [0, 0, 0.25]])
    pairs = [LayerPair(1, 1), LayerPair(3, 2)]  # teacher, student
    assert before.paired_mean(pairs) == pytest.approx((0.1 + 0.6) / 2)
    assert math.isnan(before.paired_mean([]))
    rows = list(csv.DictReader(io.StringIO(lens_map_csv(before, after))))
    assert len(rows) == 6
    assert rows[-1] == {
        "student_layer": "2",
        "teacher_layer": "3",
        "jsd_before_nats": "0.6",
        "jsd_after_nats": "0.25",
    }
    assert entropy_csv(before, after).splitlines()[1] == "teacher,1,3.0"


def test_heatmap_puts_layers_and_frames_in_place() -> None:
    lens_map = map_of([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    figure = plot_lens_map(
        lens_map, title="Before", pairs=[LayerPair(3, 1)], largest=0.6, theme=LIGHT
    )
    axes = figure.axes[0]
    (image,) = axes.images
    assert image.get_clim() == (0.0, 0.6)
    # Teacher block 3, student block 1 is the framed cell; its colour is that of 0.3.
    for frame in axes.patches:
        assert frame.get_extents().transformed(axes.transData.inverted()).bounds == pytest.approx(
            (2.5, 0.5, 1.0, 1.0)
        )
    assert np.asarray(image.get_array())[0, 2] == 0.3
    assert image.get_extent() == [0.5, 3.5, 0.5, 2.5]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("teacher block", "student block")


def test_panels_draw_in_both_themes() -> None:
    before, after = map_of([[0.1, 0.2], [0.4, 0.5]]), map_of([[0.0, 0.1], [0.2, 0.3]])
    panels = lens_panels(
        before, after, pairs=[], largest=0.5, largest_change=0.2, prefix="lens_map_1"
    )
    assert [panel.name for panel in panels] == [
        f"lens_map_1_{what}" for what in ("before", "after", "change", "entropy")
    ]
    for panel in panels:
        for theme in THEMES:
            assert figure_png(panel.draw(theme)).startswith(b"\x89PNG")


def test_colour_limit() -> None:
    assert colour_limit([np.array([-0.5, 0.2]), np.array([np.nan, 0.1])]) == 0.5
    assert colour_limit([]) > 0
