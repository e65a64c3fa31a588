"""Families that families.py was never told of: those that work, and what the others are told."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import Workspace, build_bpe
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import evaluate
import train
from distilllens.errors import ConfigError
from distilllens.families import find_parts
from distilllens.lens import LogitLens

IDS = torch.tensor([[5, 17, 200, 3, 9]])


class HomemadeConfig(PretrainedConfig):
    """Of a model that no library knows; ``trick`` is what is unusual in it."""

    model_type = "homemade"

    def __init__(self, trick: str = "", num_hidden_layers: int = 3, **more: Any) -> None:
        self.vocab_size, self.hidden_size, self.trick = 300, 16, trick
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**more)


class Mixer(nn.Module):
    """A block that mixes each token with the mean of those before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, width)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        count = torch.arange(1, hidden_BTD.shape[1] + 1)[:, None]
        return hidden_BTD + self.map(hidden_BTD.cumsum(1) / count).tanh()


class HomemadeBody(PreTrainedModel):
    config_class = HomemadeConfig

    def __init__(self, config: HomemadeConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(300, 16)
        mixers = [Mixer(16) for _ in range(config.num_hidden_layers)]
        if config.trick == "no list":
            self.first, self.second, self.third = mixers
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        else:
            self.mixers = nn.ModuleList(mixers)
        norm = nn.LayerNorm(16)
        if config.trick == "norm of another name":
            self.polish = norm
        else:
            self.final_norm = norm
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> Any:
        hidden = self.words(input_ids)
        trick = self.config.trick
        mixers = [self.first, self.second, self.third] if trick == "no list" else self.mixers
        for mixer in mixers:
            hidden = mixer(hidden)
        if trick == "norm outside the body":
            return BaseModelOutputWithPast(last_hidden_state=hidden)
        hidden = (self.polish if trick == "norm of another name" else self.final_norm)(hidden)
        if trick == "bare tensor":
            return hidden
        return BaseModelOutputWithPast(last_hidden_state=hidden)


class BodyOfFewWords(HomemadeBody):
    def forward(self, input_ids: Tensor) -> Any:  # type: ignore[override]
        return super().forward(input_ids)


class TwoLayers(nn.Sequential):
    """A head that is no linear layer."""


class Homemade(PreTrainedModel, GenerationMixin):
    config_class = HomemadeConfig
    base_model_prefix = "body"

    def __init__(self, config: HomemadeConfig) -> None:
        super().__init__(config)
        few = config.trick == "few words"
        self.body = (BodyOfFewWords if few else HomemadeBody)(config)
        head = nn.Linear(16, 300, bias=False)
        if config.trick == "head of two layers":
            self.lm_head: nn.Module = TwoLayers(nn.Linear(16, 16), head)
        elif config.trick == "head of another name":
            self.speak = head
        else:
            self.lm_head = head
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.body.words

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        trick = self.config.trick
        output = self.body(input_ids)
        hidden = output if trick == "bare tensor" else output.last_hidden_state
        if trick == "norm outside the body":
            hidden = self.body.final_norm(hidden)
        if trick == "scaled before the head":
            hidden = hidden / 4
        head = self.speak if trick == "head of another name" else self.lm_head
        if trick == "head not called":
            return CausalLMOutputWithPast(logits=hidden @ self.lm_head.weight.T)
        logits = head(hidden)
        return CausalLMOutputWithPast(logits=logits + 1 if trick == "added behind" else logits)


class OneFloor(PreTrainedModel):
    """Blocks and head in one module."""

    config_class = HomemadeConfig

    def __init__(self, config: HomemadeConfig) -> None:
        super().__init__(config)
        self.words, self.lm_head = nn.Embedding(300, 16), nn.Linear(16, 300)
        self.mixers = nn.ModuleList(Mixer(16) for _ in range(3))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes the family known to the Auto classes, as a user's own package would."""
    AutoConfig.register("homemade", HomemadeConfig)
    AutoModelForCausalLM.register(HomemadeConfig, Homemade)
    yield
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    del CONFIG_MAPPING._extra_content["homemade"]
    del MODEL_FOR_CAUSAL_LM_MAPPING._extra_content[HomemadeConfig]
    assert "homemade" not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def save(workspace: Workspace, **student: Any) -> None:
    for name, options in (("student", student), ("teacher", {"num_hidden_layers": 5})):
        torch.manual_seed(len(name))
        Homemade(HomemadeConfig(**options)).save_pretrained(workspace.root / name)
        build_bpe().save_pretrained(workspace.root / name)


@pytest.mark.usefixtures("registered")
def test_a_family_of_the_users_own(workspace: Workspace) -> None:
    """Trained, exported, loaded again and scored, without a line of ours about it."""
    save(workspace)
    assert train.main(workspace.flags("--optim.max_steps", "2")) == 0
    exported = AutoModelForCausalLM.from_pretrained(workspace.root / "run/latest")
    assert type(exported) is Homemade
    assert torch.isfinite(exported(IDS).logits).all()
    options = ("--eval.seeds", "[1]", "--eval.max_new_tokens", "4")
    folders = ("--checkpoint", f"{workspace.root}/run/latest", "--output_dir")
    where = ("--data_dir", f"{workspace.root}/data", "--sets", "[toy]")
    assert evaluate.main([*folders, f"{workspace.root}/scores", *where, *options]) == 0


REFUSED = {
    "no list": ("no list of 3 transformer blocks", "lists .* in its HomemadeBody: experts \\(2\\)"),
    "head of another name": ("no LM head", r"Homemade\.get_output_embeddings\(\) returns None"),
    "head of two layers": ("the LM head is TwoLayers, not a linear layer", "head's weight"),
    "norm of another name": (
        "differs from the model's own logits",
        "what enters the head Linear is not the last block's output behind the final norm "
        r"Identity \(no norm, ln_f, .* beside the blocks\)",
    ),
    "scaled before the head": (
        "differs from the model's own logits",
        "what enters the head Linear is not the last block's output behind the final norm "
        "LayerNorm",
    ),
    "norm outside the body": (  # the lens is right, but not what a step would train
        "differs from the model's own logits",
        "what enters the head Linear is not the last_hidden_state of HomemadeBody; final norm "
        "LayerNorm",
    ),
    "added behind": (
        "differs from the model's own logits",
        "behind the head Linear stands something else than None",
    ),
    "head not called": ("differs", "the model does not call its head Linear"),
    "bare tensor": ("HomemadeBody returns Tensor, no last_hidden_state", "as those of"),
    "few words": (
        "BodyOfFewWords.forward takes no position_ids, use_cache",
        "the body of family 'homemade' is run as those of transformers",
    ),
}


@pytest.mark.parametrize("trick", REFUSED)
def test_what_does_not_fit_is_named(trick: str) -> None:
    model, (what, why) = Homemade(HomemadeConfig(trick=trick)), REFUSED[trick]
    nn.init.normal_(model.body.words.weight)
    if trick == "head not called":
        nn.init.zeros_(model.body.final_norm.weight)  # else the logits are right all the same
        model.register_forward_hook(
            lambda _m, _i, output: output.__setitem__("logits", output.logits + 1)
        )
    with pytest.raises(ConfigError, match=what) as caught:
        LogitLens(model).self_check(IDS)
    assert caught.value.fix and caught.value.exit_code == 2
    assert re.search(why, caught.value.why), caught.value.why
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_blocks_beside_the_head_are_refused() -> None:
    with pytest.raises(ConfigError, match="no body apart from the LM head") as caught:
        find_parts(OneFloor(HomemadeConfig()))
    assert "the blocks (mixers) stand in OneFloor itself" in caught.value.why


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("trick", ["no list", "head of two layers", "scaled before the head"])
def test_training_ends_with_that_message(
    workspace: Workspace, trick: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(workspace, trick=trick)
    assert train.main(workspace.flags()) == 2
    told = capsys.readouterr().err
    assert "error[DL-CONFIG]" in told and "homemade" in told and "Traceback" not in told
    assert not (workspace.root / "run/latest").exists()


# --- Models of texts and pictures ---------------------------------------------------------------


def gemma3_with_pictures(blocks: int, width: int) -> Gemma3ForConditionalGeneration:
    torch.manual_seed(blocks)
    text: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": blocks,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 160,
    }
    vision: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    special: dict[str, Any] = {"boi_token_index": 1, "eoi_token_index": 2, "image_token_index": 3}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **special)
    config.update({"eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 0})
    return Gemma3ForConditionalGeneration(config)


def test_the_text_half_of_a_model_with_pictures_is_trained(workspace: Workspace) -> None:
    """Its other half goes along unchanged."""
    for name, blocks, width in (("student", 3, 16), ("teacher", 5, 32)):
        gemma3_with_pictures(blocks, width).save_pretrained(workspace.root / name)
    before = AutoModelForCausalLM.from_pretrained(workspace.root / "student")
    assert train.main(workspace.flags("--optim.max_steps", "2")) == 0
    after = AutoModelForCausalLM.from_pretrained(workspace.root / "run/latest")
    assert type(after) is Gemma3ForConditionalGeneration
    weights = dict(after.named_parameters())
    changed = {n for n, p in before.named_parameters() if not torch.equal(p, weights[n])}
    assert any("language_model" in name for name in changed)
    assert not any("vision" in name or "multi_modal" in name for name in changed)
