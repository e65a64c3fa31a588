"""Families of transformers beyond those of model_zoo: the lens of each is exact, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distilllens.errors import ConfigError
from distilllens.families import find_parts
from distilllens.lens import LogitLens

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "pad_token_id": 0,
}
"""Each family takes what it knows of them."""

EXACT = """
    apertus arcee biogpt bitnet cohere2 deepseek_v2 ernie4_5 ernie4_5_moe exaone4 flex_olmo gemma
    glm glm4 gpt_bigcode gpt_oss granitemoe helium hunyuan_v1_dense jetmoe lfm2 llama4_text mamba
    ministral nanochat nemotron olmo olmo3 olmoe openai-gpt persimmon phimoe qwen2_moe
    recurrent_gemma seed_oss stablelm starcoder2 vaultgemma xglm
""".split()
REFUSED = "bart bert ctrl modernbert-decoder rwkv".split()
"""Other ways from the last block to the logits, or no such blocks."""


def build(family: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.add_(0.3 * noise) if parameter.ndim == 1 else parameter.copy_(0.2 * noise)
    return model


IDS = torch.randint(1, 61, (1, 8), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", EXACT)
def test_exact(family: str) -> None:
    model = build(family)
    assert LogitLens(model).self_check(IDS) < 1e-5
    assert LogitLens(model.to(torch.bfloat16)).self_check(IDS) < 1e-5
    assert len(find_parts(model).blocks) == 3
    assert find_parts(model).body is not model


@pytest.mark.parametrize("family", REFUSED)
def test_refused_with_what_is_missing(family: str) -> None:
    with pytest.raises(ConfigError, match=family) as caught:
        LogitLens(build(family)).self_check(IDS)
    assert caught.value.why and caught.value.fix
