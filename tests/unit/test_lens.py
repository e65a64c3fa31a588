"""The logit lens of every family against its mathematics, written out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_zoo import BLOCKS, FAMILIES, MULTIPLIER, SOFT_CAP, VOCAB, WIDTH, build, token_ids
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from distilllens import families
from distilllens.errors import ConfigError
from distilllens.lens import LogitLens


def layer_norm(h: Tensor, norm: Any) -> Tensor:
    centred = h - h.mean(-1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * norm.weight + norm.bias


def rms_norm(h: Tensor, weight: Tensor, epsilon: float = 1e-6) -> Tensor:
    return h / (h.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() * weight


def llama(model: Any, h: Tensor, epsilon: float = 1e-6) -> Tensor:
    return rms_norm(h, model.model.norm.weight, epsilon) @ model.lm_head.weight.T


def gemma(model: Any, h: Tensor) -> Tensor:
    logits = rms_norm(h, 1 + model.model.norm.weight) @ model.model.embed_tokens.weight.T
    return SOFT_CAP * torch.tanh(logits / SOFT_CAP)


def cohere(model: Any, h: Tensor) -> Tensor:
    bare = SimpleNamespace(weight=model.model.norm.weight, bias=0.0)
    return 0.0625 * layer_norm(h, bare) @ model.model.embed_tokens.weight.T


def phi(model: Any, h: Tensor) -> Tensor:
    normed = layer_norm(h, model.model.final_layernorm)
    return normed @ model.lm_head.weight.T + model.lm_head.bias


def gptj(model: Any, h: Tensor) -> Tensor:
    return layer_norm(h, model.transformer.ln_f) @ model.lm_head.weight.T + model.lm_head.bias


def mpt(model: Any, h: Tensor) -> Tensor:
    bare = SimpleNamespace(weight=model.transformer.norm_f.weight, bias=0.0)
    return layer_norm(h, bare) @ model.transformer.wte.weight.T


def opt_projected(model: Any, h: Tensor) -> Tensor:
    return h @ model.model.decoder.project_out.weight.T @ model.lm_head.weight.T


LENSES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "gpt2": lambda m, h: layer_norm(h, m.transformer.ln_f) @ m.transformer.wte.weight.T,
    "llama": llama,
    "qwen2": lambda m, h: rms_norm(h, m.model.norm.weight) @ m.model.embed_tokens.weight.T,
    "qwen3": llama,
    "mistral": llama,
    "gemma2": gemma,
    "gemma3": gemma,
    "granite": lambda m, h: llama(m, h) / 8,
    "cohere": cohere,
    "phi": phi,
    "phi3": lambda m, h: llama(m, h, epsilon=1e-5),
    "olmo2": lambda m, h: llama(m, h, epsilon=1e-5),
    "gpt_neox": lambda m, h: layer_norm(h, m.gpt_neox.final_layer_norm) @ m.lm_head.weight.T,
    "opt-pre-norm": lambda m, h: (
        layer_norm(h, m.model.decoder.final_layer_norm) @ m.model.decoder.embed_tokens.weight.T
    ),
    "opt-post-norm": lambda m, h: h @ m.model.decoder.embed_tokens.weight.T,
    "opt-projected": opt_projected,
    "llama-tied": lambda m, h: rms_norm(h, m.model.norm.weight) @ m.model.embed_tokens.weight.T,
    "smollm3": lambda m, h: rms_norm(h, m.model.norm.weight) @ m.model.embed_tokens.weight.T,
    "gptj": gptj,
    "falcon": lambda m, h: (
        layer_norm(h, m.transformer.ln_f) @ m.transformer.word_embeddings.weight.T
    ),
    "bloom": lambda m, h: layer_norm(h, m.transformer.ln_f) @ m.lm_head.weight.T,
    "mpt": mpt,
    "mixtral": lambda m, h: llama(m, h, epsilon=1e-5),
    "qwen3_moe": llama,
    "hyperclovax": lambda m, h: MULTIPLIER * llama(m, h),
    "minicpm3": lambda m, h: llama(m, h, epsilon=1e-5) / 4,
}
"""head(norm(h)) of each family in float64, from its weights alone."""


@pytest.mark.parametrize("family", FAMILIES)
def test_lens_is_the_head_of_the_norm(family: str) -> None:
    model = build(family).double()
    ids = token_ids(2, 5)
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
        lens = LogitLens(model)
        for layer in range(1, BLOCKS):
            expected = LENSES[family](model, states[layer])
            assert expected.shape == (2, 5, VOCAB)
            # Families compute their norm in float32, whatever the model's type.
            torch.testing.assert_close(
                lens.logits(states[layer]),
                expected,
                rtol=1e-5,
                atol=1e-5 * expected.abs().max().item(),
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_self_check_passes(family: str) -> None:
    model: Any = build(family)
    ids = token_ids(1, 8)
    for norm in ("final", "none"):
        assert LogitLens(model, norm).self_check(ids) < 1e-5
    parameters = list(model.to(torch.bfloat16).parameters())
    assert LogitLens(model).self_check(ids) < 1e-5
    assert not model.training
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(not block._forward_hooks for block in LogitLens(model).parts.blocks)


def test_self_check_passes_under_lora_and_keeps_the_mode() -> None:
    model = build("qwen2")
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    wrapped.train()
    assert LogitLens(wrapped).self_check(token_ids(1, 8)) < 1e-5
    assert model.training
    assert all(not block._forward_hooks for block in LogitLens(wrapped).parts.blocks)


def test_without_norm_the_head_alone() -> None:
    model = build("gemma2")
    hidden = torch.randn(4, WIDTH)
    logits = LogitLens(model, "none").logits(hidden)
    expected = SOFT_CAP * torch.tanh(hidden @ model.lm_head.weight.T / SOFT_CAP)
    torch.testing.assert_close(logits, expected)
    assert not torch.allclose(logits, LogitLens(model).logits(hidden), atol=1e-2)


def test_unknown_norm_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lens\.norm='last' must be 'final' or 'none'"):
        LogitLens(build("gpt2"), "last")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_unembedding_is_the_rest_of_the_way(family: str) -> None:
    """`fused` gets normed rows and this; together they must be the lens."""
    lens = LogitLens(build(family))
    hidden = torch.randn(3, WIDTH)
    side = lens.unembedding()
    logits = lens.normalize(hidden) @ side.head_VD.T
    logits = logits if side.bias_V is None else logits + side.bias_V
    logits = logits if side.transform is None else side.transform(logits)
    torch.testing.assert_close(logits, lens.logits(hidden))


# --- What self_check must refuse ----------------------------------------------------------------


def refused(lens: LogitLens, family: str) -> str:
    with pytest.raises(ConfigError, match=f"the logit lens of family '{family}' differs") as caught:
        lens.self_check(token_ids(1, 8))
    assert "families.py" in caught.value.fix
    return caught.value.why


def test_a_swapped_norm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FINAL_NORM_NAMES", ("embed_norm",))
    assert "final norm Identity" in refused(LogitLens(build("llama")), "llama")


@pytest.mark.parametrize("norm", ["final", "none"])
def test_the_parts_in_use_are_what_is_checked(norm: Any) -> None:
    lens = LogitLens(build("gpt2"), norm)
    lens.parts = dataclasses.replace(lens.parts, final_norm=nn.LayerNorm(WIDTH))
    assert "final norm LayerNorm" in refused(lens, "gpt2")


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere"])
def test_a_forgotten_transform_is_refused(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_logit_transform", lambda _: None)
    refused(LogitLens(build(family)), family)


def test_something_unknown_before_the_logits_is_refused() -> None:
    model = build("llama")
    model.model.norm.register_forward_hook(lambda *_: None)
    assert LogitLens(model).self_check(token_ids(1, 8)) < 1e-5
    model.register_forward_hook(lambda _m, _i, output: output.__setitem__("logits", output[0] + 1))
    refused(LogitLens(model), "llama")


class Capped(GPT2LMHeadModel):
    """A soft cap that nothing tells of, and that logits of this size hardly reach."""

    def forward(self, *args: Any, **options: Any) -> Any:
        output: Any = super().forward(*args, **options)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_roundings_of_16_bits_would_hide_is_refused(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    size: dict[str, Any] = {"n_layer": 3, "n_embd": 64, "n_head": 2, "vocab_size": 211}
    model: Any = Capped(GPT2Config(**size, initializer_range=0.12)).eval()
    model.to(dtype)
    ids = torch.randint(0, 211, (1, 16))
    with torch.no_grad():
        bare = model.lm_head(model.transformer(ids).last_hidden_state)
        capped = model(ids).logits
    assert (bare - capped).abs().max() / capped.abs().max() < 0.006  # one or two roundings
    with pytest.raises(ConfigError, match=r"'gpt2' differs .* by 0\.00") as caught:
        LogitLens(model).self_check(ids)
    assert "behind the head Linear stands something else than None" in caught.value.why


def test_what_has_16_bits_only_behind_the_blocks_is_refused() -> None:
    """A map that changes nothing, as an adapter before its training: the lens is right by luck."""
    model: Any = build("llama")
    model.to(torch.bfloat16)
    after = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(after.weight)
    model.model.norm.register_forward_hook(lambda _m, _i, normed: normed + after(normed))
    with pytest.raises(ConfigError, match="'llama' cannot be proved in 16 bits") as caught:
        LogitLens(model).self_check(token_ids(1, 8))
    assert "does not run in float32" in caught.value.why and "float32" in caught.value.fix
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_weights_that_are_not_finite_are_refused() -> None:
    model: Any = build("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = float("nan")
    with pytest.raises(ConfigError, match="gives logits that are not finite"):
        LogitLens(model).self_check(token_ids(1, 8))


# --- Packing and compiling, which go around the model's own forward -----------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_records_do_not_see_each_other_or_are_refused(family: str) -> None:
    lens = LogitLens(build(family))
    ids_BT = token_ids(1, 8)
    try:
        assert lens.packing_check(ids_BT) < 1e-5
    except ConfigError as error:
        assert family.startswith("opt") or family in ("falcon", "bloom", "mpt"), error
        assert "data.packing" in str(error)


def test_a_model_that_ignores_position_ids_is_refused() -> None:
    model: Any = build("llama")
    forward = model.model.forward
    model.model.forward = lambda *a, position_ids=None, **k: forward(*a, **k)
    with pytest.raises(ConfigError, match="crosses the records of a row"):
        LogitLens(model).packing_check(token_ids(1, 8))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_compiled_blocks_give_the_same_rows_and_gradients(family: str) -> None:
    model = build(family)
    parts = families.find_parts(model)
    calls = []

    def rows_and_gradients(length: int) -> list[Tensor]:
        model.zero_grad()
        final, captured = families.run_body(parts, token_ids(2, length), [1, 2])
        (final.square().sum() + captured[1].square().sum()).backward()
        gradients = [p.grad.clone() for p in parts.blocks.parameters() if p.grad is not None]
        return [final.detach(), captured[1].detach(), captured[2].detach(), *gradients]

    lengths = (8, 13, 21)
    expected = [rows_and_gradients(length) for length in lengths]
    torch._dynamo.utils.counters.clear()
    families.compile_blocks(parts)
    handle = parts.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    for length, plain in zip(lengths, expected, strict=True):
        torch.testing.assert_close(rows_and_gradients(length), plain, atol=1e-4, rtol=1e-4)
    handle.remove()
    assert len(calls) == len(lengths)  # hooks run outside what is compiled
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 1 <= graphs < BLOCKS * len(lengths)  # neither left alone nor compiled for each block
