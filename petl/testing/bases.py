"""Tiny models of further kinds, on which the contract holds too: see `OTHER_MODELS`."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutput

from petl.testing.models import (
    OTHER_MODELS,
    PAD,
    VOCABULARY,
    Batch,
    TinyModel,
    build_seeded,
    causal_batch,
    create_config,
)

IMAGE = 3  # the token in whose place a patch of an image stands
PATCHES = 4


def tiny_mamba(layers: int = 2) -> MambaForCausalLM:
    """Build a Mamba, whose layers hold no attention and read weights of their children."""
    config = MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        state_size=8,
        num_hidden_layers=layers,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=None,
        use_cache=False,
    )
    return build_seeded(MambaForCausalLM, config)


def tiny_llava(layers: int = 2) -> LlavaForConditionalGeneration:
    """Build a LLaVA: a Llama that reads the patches of images of 16 x 16 pixels."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    sizes |= {"num_hidden_layers": layers}
    ids = {
        "vocab_size": VOCABULARY,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    text = create_config(LlamaConfig, **sizes, **ids, num_key_value_heads=2, use_cache=False)
    vision = create_config(CLIPVisionConfig, **sizes, image_size=16, patch_size=8)
    config = create_config(
        LlavaConfig,
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
    )
    return build_seeded(LlavaForConditionalGeneration, config)


class PlainBlock(nn.Module):
    """A feed-forward of two linear layers on the mean of the tokens so far."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 96), nn.Linear(96, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return hidden states [B, T, H]."""
        count = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return x + self.down(F.gelu(self.up(self.norm(x.cumsum(1) / count))))


class PlainModel(nn.Module):
    """A language model of plain PyTorch: no config, no class of transformers."""

    def __init__(self, layers: int = 2, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(PlainBlock(width) for _ in range(layers))
        self.out = nn.Linear(width, VOCABULARY)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> CausalLMOutput:
        """Return the logits, and the loss of predicting each label from the token before it."""
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        logits = self.out(x)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


def tiny_plain() -> PlainModel:
    """Build a module without a config."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PlainModel().eval()


def seen_batch(rows: int, seed: int) -> Batch:
    """Return token ids after the patches of an image, with themselves as labels."""
    batch = causal_batch(rows, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, value in (("input_ids", IMAGE), ("attention_mask", 1), ("labels", -100)):
        batch[name] = F.pad(batch[name], (PATCHES, 0), value=value)
    # the token of images elsewhere would stand for a patch, too
    text = batch["input_ids"][:, PATCHES:]
    text[text == IMAGE] = IMAGE + 1
    return {**batch, "pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}


OTHER_MODELS |= {
    model.name: model
    for model in (
        TinyModel("mamba", tiny_mamba, causal_batch, "CAUSAL_LM", True, True),
        TinyModel("llava", tiny_llava, seen_batch, "CAUSAL_LM", True, False),
        TinyModel("plain", tiny_plain, causal_batch, None, True),  # ty: ignore[invalid-argument-type]
    )
}
# petl's methods that refuse a base: those of sub-layers with attention, of one list of blocks
# (unless `blocks` names it), of usual names of projections, and of one kind of model
BEYOND = ("dkvb", "pyra", "scedit", "vl_pet")
NO_ATTENTION = ("adapter", "binary", "compacter", "dsee", "icv", "polyhistor", "sherl")
REFUSED = {
    "mamba": (*NO_ATTENTION, *BEYOND),
    "llava": BEYOND,
    "plain": (*NO_ATTENTION, *BEYOND),
}
