"""The parts of every family, and that block i gives what transformers calls hidden_states[i]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_zoo import BLOCKS, FAMILIES, SOFT_CAP, VOCAB, WIDTH, build, token_ids
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from distilllens.errors import ConfigError
from distilllens.families import (
    base_model,
    capture_blocks,
    find_parts,
    gather_rows,
    no_decay_parameters,
    parameter_count,
    run_body,
)
from distilllens.kernels.chunks import LogitTransform

# Where each family keeps its final norm; written down from the model files, None: it has none.
FINAL_NORMS: dict[str, Callable[[Any], nn.Module] | None] = {
    "gpt2": lambda m: m.transformer.ln_f,
    "gptj": lambda m: m.transformer.ln_f,
    "falcon": lambda m: m.transformer.ln_f,
    "bloom": lambda m: m.transformer.ln_f,
    "mpt": lambda m: m.transformer.norm_f,
    "phi": lambda m: m.model.final_layernorm,
    "gpt_neox": lambda m: m.gpt_neox.final_layer_norm,
    "opt-pre-norm": lambda m: m.model.decoder.final_layer_norm,
    "opt-post-norm": None,
    "opt-projected": None,
}


def hidden_states(model: nn.Module, input_ids_BT: Tensor) -> tuple[Tensor, ...]:
    output = model(input_ids=input_ids_BT, output_hidden_states=True, use_cache=False)
    states = output.hidden_states
    assert isinstance(states, tuple)
    return states


@pytest.mark.parametrize("family", FAMILIES)
def test_parts(family: str) -> None:
    model = build(family)
    parts = find_parts(model)
    assert len(parts.blocks) == BLOCKS
    assert parts.head is model.get_output_embeddings()
    assert parts.vocab_size == VOCAB == parts.head.weight.shape[0]
    find_norm = FINAL_NORMS.get(family, lambda m: m.model.norm)
    if find_norm is None:
        assert isinstance(parts.final_norm, nn.Identity)
    else:
        assert parts.final_norm is find_norm(model)
    assert isinstance(parts.project_out, nn.Identity) == (family != "opt-projected")
    assert (parts.head.bias is not None) == (family in ("phi", "gptj"))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", None),
        ("gemma2", LogitTransform(softcap=SOFT_CAP)),
        ("gemma3", LogitTransform(softcap=SOFT_CAP)),
        ("granite", LogitTransform(scale=1 / 8)),
        ("cohere", LogitTransform(scale=0.0625)),
    ],
)
def test_logit_transform(family: str, expected: LogitTransform | None) -> None:
    assert find_parts(build(family)).transform == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_block_i_gives_hidden_states_i(family: str) -> None:
    model = build(family)
    ids = token_ids(2, 7)
    with torch.no_grad():
        states = hidden_states(model, ids)
        final, captured = run_body(find_parts(model), ids, range(1, BLOCKS + 1))
    assert sorted(captured) == [1, 2, 3] and len(states) == BLOCKS + 1
    for layer in range(1, BLOCKS):
        assert torch.equal(captured[layer], states[layer]), layer
    assert not torch.allclose(captured[1], captured[2], atol=1e-2)
    with torch.no_grad():
        head = model.get_output_embeddings()
        transform = find_parts(model).transform or (lambda logits: logits)
        torch.testing.assert_close(transform(head(final)), model(input_ids=ids).logits)


def test_only_the_asked_blocks_are_captured_and_hooks_go() -> None:
    model = build("llama")
    parts = find_parts(model)
    with capture_blocks(parts, [2, 2, 3]) as captured:
        model(input_ids=token_ids(1, 3))
    assert sorted(captured) == [2, 3]
    before = captured[2]
    model(input_ids=token_ids(1, 3))
    assert captured[2] is before
    assert not any(block._forward_hooks for block in parts.blocks)
    with pytest.raises(RuntimeError), capture_blocks(parts, [1]):
        raise RuntimeError
    assert not any(block._forward_hooks for block in parts.blocks)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt-post-norm"])
def test_padding_on_the_right_changes_no_real_row(family: str) -> None:
    """No mask is passed: causal attention alone keeps padding out."""
    parts = find_parts(build(family))
    lengths = [3, 9, 6]
    padded = torch.full((3, 9), 5)
    for row, length in enumerate(lengths):
        padded[row, :length] = token_ids(length, seed=row)
    with torch.no_grad():
        final_BTD, captured = run_body(parts, padded, [2])
        for row, length in enumerate(lengths):
            alone, alone_captured = run_body(parts, padded[row : row + 1, :length], [2])
            rows = torch.arange(length) + row * 9
            for batch, single in ((final_BTD, alone), (captured[2], alone_captured[2])):
                torch.testing.assert_close(gather_rows(batch, rows), single[0])


def gradients(model: nn.Module, *, recompute: bool) -> dict[str, Tensor]:
    """Returns gradients of a function of block 2's output and of the body's."""
    base = base_model(model)
    if recompute:
        base.activation_checkpointing_enable({"use_reentrant": False})
    model.train().zero_grad()
    parts, runs = find_parts(model), []
    handle = next(parts.blocks[1].children()).register_forward_pre_hook(lambda *_: runs.append(1))
    final, captured = run_body(parts, token_ids(2, 5), [2])
    (final.square().mean() + captured[2].sin().sum()).backward()
    handle.remove()
    assert len(runs) == (2 if recompute else 1)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt-post-norm"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_gradient_flows_through_captured_blocks_when_recomputed(family: str, lora: bool) -> None:
    def prepare() -> nn.Module:
        model = build(family)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for name in ("dropout", "attention_dropout"):  # OPT keeps probabilities, not modules
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        if not lora:
            return model
        torch.manual_seed(1)
        return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))

    plain = gradients(prepare(), recompute=False)
    recomputed = gradients(prepare(), recompute=True)
    assert plain.keys() == recomputed.keys() and plain
    assert any(grad.abs().max() > 0 for grad in plain.values())
    for name in plain:
        torch.testing.assert_close(plain[name], recomputed[name])


def test_lora_is_looked_through() -> None:
    model = build("llama")
    ids = token_ids(1, 6)
    with torch.no_grad():
        expected = hidden_states(model, ids)[2]
        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).eval()
        assert base_model(wrapped) is model
        assert torch.equal(
            run_body(find_parts(wrapped), ids, [2])[1][2], expected
        )  # B = 0 at first
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
        assert not torch.allclose(run_body(find_parts(wrapped), ids, [2])[1][2], expected)
    # the adapter must not reach the head: the fused loss reads the head's weight alone
    assert type(find_parts(wrapped).head) is nn.Linear


def test_a_missing_part_is_named() -> None:
    model: Any = build("gpt2")
    model.transformer.h = nn.ModuleList(list(model.transformer.h)[:2])
    with pytest.raises(ConfigError, match="no list of 3 transformer blocks in a model of family"):
        find_parts(model)
    model = build("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ConfigError, match="LM head is Sequential, not a linear layer"):
        find_parts(model)


# --- Weight decay -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_biases_are_not_decayed_and_matrices_are(family: str) -> None:
    """By what the modules are, not by the shape of their weights."""
    model = build(family)
    exempt = no_decay_parameters(model)
    expected: set[str] = set()
    decayed: set[str] = set()
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            is_norm = "norm" in type(module).__name__.lower()
            (expected if is_norm or name == "bias" else decayed).add(f"{path}.{name}")
    tied = {name for name, _ in model.named_parameters()}
    assert exempt == expected & tied
    assert decayed & tied == tied - exempt
    assert expected and decayed


def test_parameters_are_counted_once() -> None:
    model = build("gpt2")
    # wte 61·16, wpe 64·16, a block 12·16² + 13·16, the final norm 2·16; the head is wte
    assert parameter_count(model) == 61 * 16 + 64 * 16 + 3 * (12 * WIDTH**2 + 13 * WIDTH) + 32
