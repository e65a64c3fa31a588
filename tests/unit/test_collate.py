"""Padding, labels, positions and the rows that carry loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from distilllens.data.collate import Batch, collate
from distilllens.families import find_parts, gather_rows, run_body

IDS = st.lists(st.integers(1, 299), max_size=9)
SAMPLES = st.lists(
    st.fixed_dictionaries({"prompt_ids": IDS, "response_ids": IDS}).filter(
        lambda s: bool(s["prompt_ids"] or s["response_ids"])
    ),
    min_size=1,
    max_size=5,
)


def test_by_hand() -> None:
    batch = collate(
        [
            {"prompt_ids": [5, 6], "response_ids": [7, 8, 9]},
            {"prompt_ids": [4], "response_ids": [3, 9]},
        ],
        pad_id=9,  # EOS as pad token, as for GPT-2: the real EOS keeps its label
    )
    assert batch.input_ids_BT.tolist() == [[5, 6, 7, 8, 9], [4, 3, 9, 9, 9]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 0]]
    assert batch.labels_BT.tolist() == [[-100, -100, 7, 8, 9], [-100, 3, 9, -100, -100]]
    assert batch.rows_N.tolist() == [1, 2, 3, 5, 6]
    assert batch.targets_N.tolist() == [7, 8, 9, 3, 9]
    assert batch.num_tokens == 5


@settings(deadline=None)
@given(SAMPLES, st.integers(0, 299))
def test_rows_are_the_shifted_labels(samples: list[dict[str, list[int]]], pad_id: int) -> None:
    batch = collate(samples, pad_id=pad_id)
    size, longest = batch.input_ids_BT.shape
    assert longest == max(len(s["prompt_ids"]) + len(s["response_ids"]) for s in samples)
    expected = [
        (b * longest + t - 1, int(batch.labels_BT[b, t]))
        for b in range(size)
        for t in range(1, longest)
        if batch.labels_BT[b, t] != -100
    ]
    assert list(zip(batch.rows_N.tolist(), batch.targets_N.tolist(), strict=True)) == expected
    assert batch.num_tokens == len(expected)
    for b, sample in enumerate(samples):
        tokens = [*sample["prompt_ids"], *sample["response_ids"]]
        assert batch.input_ids_BT[b].tolist()[: len(tokens)] == tokens
        assert set(batch.input_ids_BT[b].tolist()[len(tokens) :]) <= {pad_id}
        assert int(batch.attention_mask_BT[b].sum()) == len(tokens)
        labels = batch.labels_BT[b].tolist()
        assert labels[len(sample["prompt_ids"]) : len(tokens)] == sample["response_ids"]
        assert set(labels[: len(sample["prompt_ids"])] + labels[len(tokens) :]) <= {-100}


def test_loss_of_rows_equals_the_models_own(tiny_gpt2) -> None:
    samples = [
        {"prompt_ids": [5, 6, 7], "response_ids": [8, 9]},
        {"prompt_ids": [11], "response_ids": [12, 13, 14, 15, 16, 0]},
    ]
    batch = collate(samples, pad_id=0)
    with torch.no_grad():
        output = tiny_gpt2()(
            input_ids=batch.input_ids_BT,
            attention_mask=batch.attention_mask_BT,
            position_ids=batch.position_ids_BT,
            labels=batch.labels_BT,
        )
    own = cross_entropy(output.logits.flatten(0, 1)[batch.rows_N], batch.targets_N)
    torch.testing.assert_close(own, output.loss)


@pytest.mark.parametrize("family", ["tiny_gpt2", "tiny_llama", "tiny_qwen2"])
def test_padding_does_not_change_logits(family: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(family)()
    short = {"prompt_ids": [5, 6, 7], "response_ids": [8, 9]}
    long = {"prompt_ids": list(range(20, 50)), "response_ids": [1, 2, 3]}

    def rows(batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            return model(
                input_ids=batch.input_ids_BT,
                attention_mask=batch.attention_mask_BT,
                position_ids=batch.position_ids_BT,
            ).logits.flatten(0, 1)[batch.rows_N]

    alone, together = rows(collate([short], pad_id=0)), rows(collate([short, long], pad_id=0))
    torch.testing.assert_close(together[: len(alone)], alone, atol=1e-5, rtol=1e-5)


def test_packed_by_hand() -> None:
    batch = collate(
        [
            {"prompt_ids": [5], "response_ids": [7]},
            {"prompt_ids": [4, 4], "response_ids": [3, 9]},
            {"prompt_ids": [], "response_ids": [8, 6, 2]},
        ],
        pad_id=0,
        row_tokens=4,  # 9 tokens: two rows
    )
    assert batch.input_ids_BT.tolist() == [[4, 4, 3, 9, 0], [8, 6, 2, 5, 7]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert batch.rows_N.tolist() == [8, 1, 2, 5, 6]  # record by record, as given
    assert batch.targets_N.tolist() == [7, 3, 9, 6, 2]
    assert batch.packed_positions_BT is batch.position_ids_BT


@settings(deadline=None)
@given(SAMPLES, st.integers(1, 12))
def test_packing_moves_records_and_changes_none(
    samples: list[dict[str, list[int]]], row_tokens: int
) -> None:
    plain = collate(samples, pad_id=0)
    packed = collate(samples, pad_id=0, row_tokens=row_tokens)
    assert plain.packed_positions_BT is None
    assert packed.targets_N.tolist() == plain.targets_N.tolist()
    total, longest = (max(1, int(plain.attention_mask_BT.sum())), plain.input_ids_BT.shape[1])
    num_rows, width = packed.input_ids_BT.shape
    assert num_rows == min(len(samples), max(1, total // row_tokens))
    assert width <= total // num_rows + longest  # what any greedy assignment keeps
    tokens = packed.input_ids_BT[packed.attention_mask_BT == 1].tolist()
    assert sorted(tokens) == sorted(t for s in samples for t in s["prompt_ids"] + s["response_ids"])
    # Each row predicts from the same token at the same position of its record.
    for batch in (plain, packed):
        flat = batch.input_ids_BT.flatten()
        assert flat[batch.rows_N + 1].tolist() == batch.targets_N.tolist()
    for name in ("input_ids_BT", "position_ids_BT"):
        a, b = getattr(plain, name).flatten(), getattr(packed, name).flatten()
        assert a[plain.rows_N].tolist() == b[packed.rows_N].tolist()


@pytest.mark.parametrize("family", ["tiny_gpt2", "tiny_llama", "tiny_qwen2"])
def test_packing_does_not_change_hidden_rows(family: str, request: pytest.FixtureRequest) -> None:
    parts = find_parts(request.getfixturevalue(family)())
    samples = [
        {"prompt_ids": list(range(5, 5 + n)), "response_ids": list(range(40, 40 + m))}
        for n, m in [(3, 2), (1, 9), (12, 1), (4, 4), (2, 7)]
    ]
    rows = []
    for row_tokens in (None, 20, 1000):
        batch = collate(samples, pad_id=0, row_tokens=row_tokens)
        with torch.no_grad():
            final, captured = run_body(parts, batch.input_ids_BT, [1], batch.packed_positions_BT)
        rows.append([gather_rows(h, batch.rows_N) for h in (final, captured[1])])
    for packed in rows[1:]:
        torch.testing.assert_close(packed, rows[0], atol=2e-5, rtol=1e-5)
    # The control: without positions the records of a row do see each other.
    with torch.no_grad():
        final, _ = run_body(parts, batch.input_ids_BT)
    assert (gather_rows(final, batch.rows_N) - rows[0][0]).abs().max() > 1e-2


def test_no_response_token_at_all() -> None:
    batch = collate([{"prompt_ids": [1, 2], "response_ids": []}], pad_id=0)
    assert batch.num_tokens == 0
    assert batch.rows_N.shape == batch.targets_N.shape == (0,)
    assert batch.rows_N.dtype == batch.targets_N.dtype == torch.int64


def test_empty_prompt_loses_the_token_that_nothing_predicts() -> None:
    batch = collate([{"prompt_ids": [], "response_ids": [3, 4]}], pad_id=0)
    assert batch.labels_BT.tolist() == [[3, 4]]
    assert (batch.rows_N.tolist(), batch.targets_N.tolist()) == ([0], [4])


def test_int32_arrays_become_int64() -> None:
    row = {"prompt_ids": np.array([1], np.int32), "response_ids": np.array([2], np.int32)}
    batch = collate([row], pad_id=0)  # type: ignore[list-item]
    tensors = [v for v in vars(batch).values() if isinstance(v, torch.Tensor)]
    assert len(tensors) == 6
    assert {t.dtype for t in tensors} == {torch.int64}


def test_to_moves_every_tensor() -> None:
    batch = collate([{"prompt_ids": [1], "response_ids": [2]}], pad_id=0).to("meta")
    tensors = [v for v in vars(batch).values() if isinstance(v, torch.Tensor)]
    assert {t.device.type for t in tensors} == {"meta"}
    assert batch.num_tokens == 1


@pytest.mark.parametrize("samples", [[], [{"prompt_ids": [], "response_ids": []}]])
def test_nothing_to_collate(samples: list) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        collate(samples, pad_id=0)
