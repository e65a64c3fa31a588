"""One tiny random model of each family, with norms and biases that are not their neutral values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB, WIDTH, BLOCKS = 61, 16, 3
SPECIAL: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
MODERN: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    **SPECIAL,
}
SOFT_CAP = 0.5
"""Small enough to bend the logits of a tiny random model."""


def gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=WIDTH, n_layer=BLOCKS, n_head=2, n_positions=64, **SPECIAL
    )
    return GPT2LMHeadModel(config)


def gpt_neox() -> PreTrainedModel:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**{**MODERN, "num_key_value_heads": 2}))


def opt(before: bool, embedding: int) -> PreTrainedModel:
    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        ffn_dim=32,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        max_position_embeddings=64,
        do_layer_norm_before=before,
        word_embed_proj_dim=embedding,
        **SPECIAL,
    )
    return OPTForCausalLM(config)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": gpt2,
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**MODERN, tie_word_embeddings=False)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**MODERN, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**MODERN, head_dim=8)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**MODERN)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**MODERN, head_dim=8, final_logit_softcapping=SOFT_CAP)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**MODERN, head_dim=8, final_logit_softcapping=SOFT_CAP)
    ),
    "granite": lambda: GraniteForCausalLM(
        GraniteConfig(
            **MODERN, logits_scaling=8.0, embedding_multiplier=3.0, residual_multiplier=0.5
        )
    ),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**MODERN, logit_scale=0.0625)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**MODERN)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**MODERN)),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**MODERN)),
    "gpt_neox": gpt_neox,
    "opt-pre-norm": lambda: opt(True, WIDTH),
    "opt-post-norm": lambda: opt(False, WIDTH),
    "opt-projected": lambda: opt(False, 12),
}


def build(family: str) -> PreTrainedModel:
    """Returns a float32 model in evaluation mode; every vector in it (norm, bias) is random."""
    torch.manual_seed(7)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return model


def token_ids(*size: int, seed: int = 0) -> torch.Tensor:
    """Returns random token ids (int64), none of them special."""
    return torch.randint(1, VOCAB, size, generator=torch.Generator().manual_seed(seed))
