"""One tiny random model of each family, with norms and biases that are not their neutral values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    HyperCLOVAXConfig,
    HyperCLOVAXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MiniCPM3Config,
    MiniCPM3ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MptConfig,
    MptForCausalLM,
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
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

VOCAB, WIDTH, BLOCKS = 61, 16, 3
SPECIAL: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SOFT_CAP = 0.5
"""Small enough to bend the logits of a tiny random model."""
MULTIPLIER = 3.0
"""Of HyperCLOVA-X's logits."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a model is; every one has two heads."""

    vocab: int = VOCAB
    width: int = WIDTH
    blocks: int = BLOCKS
    positions: int = 64

    def modern(self, **more: Any) -> dict[str, Any]:
        """Returns it in the words of most configurations; ``more`` wins."""
        return {
            "vocab_size": self.vocab,
            "hidden_size": self.width,
            "intermediate_size": 2 * self.width,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": self.positions,
            **SPECIAL,
            **more,
        }

    def gpt(self, **more: Any) -> dict[str, Any]:
        """Returns it in the words of GPT-2."""
        return {
            "vocab_size": self.vocab,
            "n_embd": self.width,
            "n_layer": self.blocks,
            "n_head": 2,
            "n_positions": self.positions,
            **SPECIAL,
            **more,
        }


def opt(size: Size, *, before: bool, embedding: int | None = None) -> PreTrainedModel:
    config = OPTConfig(
        vocab_size=size.vocab,
        hidden_size=size.width,
        ffn_dim=2 * size.width,
        num_hidden_layers=size.blocks,
        num_attention_heads=2,
        max_position_embeddings=size.positions,
        do_layer_norm_before=before,
        word_embed_proj_dim=embedding or size.width,
        **SPECIAL,
    )
    return OPTForCausalLM(config)


def falcon(size: Size) -> PreTrainedModel:
    shape = size.modern()
    del shape["num_key_value_heads"]
    return FalconForCausalLM(FalconConfig(**shape))


def bloom(size: Size) -> PreTrainedModel:
    shape: dict[str, Any] = {"hidden_size": size.width, "n_layer": size.blocks, "n_head": 2}
    return BloomForCausalLM(BloomConfig(vocab_size=size.vocab, **shape, **SPECIAL))


def mpt(size: Size) -> PreTrainedModel:
    shape: dict[str, Any] = {"d_model": size.width, "n_layers": size.blocks, "n_heads": 2}
    return MptForCausalLM(
        MptConfig(vocab_size=size.vocab, max_seq_len=size.positions, **shape, **SPECIAL)
    )


def minicpm3(size: Size) -> PreTrainedModel:
    ranks: dict[str, Any] = {
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
    }
    config = MiniCPM3Config(
        **size.modern(num_key_value_heads=2), **ranks, v_head_dim=6, dim_model_base=4
    )
    return MiniCPM3ForCausalLM(config)


IN_FLOAT64: dict[str, Any] = {"experts_implementation": "eager"}
"""Other products with experts know 32 bits at most."""
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, **IN_FLOAT64}

FAMILIES: dict[str, Callable[[Size], PreTrainedModel]] = {
    "gpt2": lambda s: GPT2LMHeadModel(GPT2Config(**s.gpt())),
    "llama": lambda s: LlamaForCausalLM(LlamaConfig(**s.modern(), tie_word_embeddings=False)),
    "llama-tied": lambda s: LlamaForCausalLM(LlamaConfig(**s.modern(), tie_word_embeddings=True)),
    "smollm3": lambda s: SmolLM3ForCausalLM(SmolLM3Config(**s.modern())),
    "qwen2": lambda s: Qwen2ForCausalLM(Qwen2Config(**s.modern(), tie_word_embeddings=True)),
    "qwen3": lambda s: Qwen3ForCausalLM(Qwen3Config(**s.modern(head_dim=8))),
    "mistral": lambda s: MistralForCausalLM(MistralConfig(**s.modern())),
    "gemma2": lambda s: Gemma2ForCausalLM(
        Gemma2Config(**s.modern(head_dim=8, final_logit_softcapping=SOFT_CAP))
    ),
    "gemma3": lambda s: Gemma3ForCausalLM(
        Gemma3TextConfig(**s.modern(head_dim=8, final_logit_softcapping=SOFT_CAP))
    ),
    "granite": lambda s: GraniteForCausalLM(
        GraniteConfig(
            **s.modern(logits_scaling=8.0, embedding_multiplier=3.0, residual_multiplier=0.5)
        )
    ),
    "cohere": lambda s: CohereForCausalLM(CohereConfig(**s.modern(logit_scale=0.0625))),
    "phi": lambda s: PhiForCausalLM(PhiConfig(**s.modern())),
    "phi3": lambda s: Phi3ForCausalLM(Phi3Config(**s.modern())),
    "olmo2": lambda s: Olmo2ForCausalLM(Olmo2Config(**s.modern())),
    "gpt_neox": lambda s: GPTNeoXForCausalLM(GPTNeoXConfig(**s.modern(num_key_value_heads=2))),
    "opt-pre-norm": lambda s: opt(s, before=True),
    "opt-post-norm": lambda s: opt(s, before=False),
    "opt-projected": lambda s: opt(s, before=False, embedding=12),
    "gptj": lambda s: GPTJForCausalLM(GPTJConfig(**s.gpt(rotary_dim=4))),
    "falcon": falcon,
    "bloom": bloom,
    "mpt": mpt,
    "mixtral": lambda s: MixtralForCausalLM(
        MixtralConfig(**s.modern(num_local_experts=4, num_experts_per_tok=2), **IN_FLOAT64)
    ),
    "qwen3_moe": lambda s: Qwen3MoeForCausalLM(Qwen3MoeConfig(**s.modern(head_dim=8), **EXPERTS)),
    "hyperclovax": lambda s: HyperCLOVAXForCausalLM(
        HyperCLOVAXConfig(**s.modern(logits_scaling=MULTIPLIER))
    ),
    "minicpm3": minicpm3,
}


def build(family: str, size: Size | None = None, seed: int = 7) -> PreTrainedModel:
    """Returns a float32 model in evaluation mode; every vector in it (norm, bias) is random."""
    torch.manual_seed(seed)
    model = FAMILIES[family](size or Size()).eval()
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
