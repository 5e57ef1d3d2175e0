"""Pretrain a small model for chats about images on drawn shapes, as a base for `data=stamps`.

    python scripts/image_text_base.py build/shapes-llava --steps 3000
    petl train +method=lora model=path model.path=build/shapes-llava data=stamps data.path=stamps

No pretrained model of this kind is in any package. This one is a LLaVA of 1.2 million parameters:
it reads 32 x 32 pixels and writes bytes. It learns to name color and shape of a drawing and the
color behind it. The state is saved every `SAVED` steps; the same command goes on from there.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

SIDE, PATCH = 32, 8  # pixels
SAVED = 250  # steps
SPECIAL = ["<pad>", "<s>", "<|im_start|>", "<|im_end|>", "<image>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COLORS = {
    "red": (210, 40, 40),
    "green": (50, 160, 60),
    "blue": (50, 70, 210),
    "yellow": (240, 220, 60),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
    "brown": (120, 80, 40),
    "gray": (128, 128, 128),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar", "frame", "half circle")
QUESTIONS = {
    "shape": "What shape is this?",
    "color": "What color is it?",
    "background": "What color is behind it?",
    "both": "What is this?",
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and those in SPECIAL."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "<|im_end|>"}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<image>"]})
    return made


def built() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model with random weights, and its processor."""
    words = tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        image_size=SIDE, patch_size=PATCH, projection_dim=128,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(words), hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        pad_token_id=0, bos_token_id=1, eos_token_id=3, tie_word_embeddings=True,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    pixels = {"height": SIDE, "width": SIDE}
    # stretched, not cropped: what is at the edges of a picture counts
    images = LlavaImageProcessorPil(size=pixels, do_center_crop=False)
    processor = LlavaProcessor(
        images, words, PATCH, "default", TEMPLATE, num_additional_image_tokens=1
    )
    return LlavaForConditionalGeneration(config), processor


def drawn(rng: random.Random) -> tuple[Image.Image, str, str]:
    """A drawing, with a question about it and the answer."""
    color, behind = rng.sample([*COLORS], 2)
    shape = rng.choice(SHAPES)
    image = Image.new("RGB", (64, 64), COLORS[behind])
    draw = ImageDraw.Draw(image)
    size = rng.randint(24, 52)
    left, top = rng.randint(2, 62 - size), rng.randint(2, 62 - size)
    box = (left, top, left + size, top + size)
    fill, middle = COLORS[color], (left + size // 2, top + size // 2)
    third = size // 3
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "square":
        draw.rectangle(box, fill=fill)
    elif shape == "triangle":
        draw.polygon([(left, box[3]), (box[2], box[3]), (middle[0], top)], fill=fill)
    elif shape == "cross":
        draw.rectangle((left + third, top, box[2] - third, box[3]), fill=fill)
        draw.rectangle((left, top + third, box[2], box[3] - third), fill=fill)
    elif shape == "ring":
        draw.ellipse(box, outline=fill, width=size // 6)
    elif shape == "bar":
        draw.rectangle((left, top + third, box[2], box[3] - third), fill=fill)
    elif shape == "frame":
        draw.rectangle(box, outline=fill, width=size // 6)
    else:
        draw.pieslice(box, 180, 360, fill=fill)
    asked = rng.choice([*QUESTIONS])
    answers = {"shape": shape, "color": color, "background": behind, "both": f"a {color} {shape}"}
    return image, QUESTIONS[asked], answers[asked]


def batch(processor: LlavaProcessor, seed: int, size: int) -> dict[str, torch.Tensor]:
    """The inputs of a model for `size` drawings, with labels on the answers."""
    rng = random.Random(seed)
    rows = [drawn(rng) for _ in range(size)]
    starts = [
        f"<|im_start|>user\n<image>{q}<|im_end|>\n<|im_start|>assistant\n" for _, q, _ in rows
    ]
    texts = [f"{start}{a}<|im_end|>" for start, (_, _, a) in zip(starts, rows, strict=True)]
    inputs = dict(
        processor(
            text=texts, images=[[image] for image, _, _ in rows], padding=True,
            padding_side="right", add_special_tokens=False, return_tensors="pt",
        )
    )  # fmt: skip
    labels = torch.full_like(inputs["input_ids"], -100)
    ends = inputs["attention_mask"].sum(1).tolist()
    for row, (end, (_, _, answer)) in enumerate(zip(ends, rows, strict=True)):
        start = end - len(answer.encode()) - 1  # a token per byte, and the end
        labels[row, start:end] = inputs["input_ids"][row, start:end]
    return {**inputs, "labels": labels}


@torch.no_grad()
def accuracy(model: LlavaForConditionalGeneration, processor: LlavaProcessor, rows: int) -> float:
    """The fraction of answers to new drawings that are exact."""
    found = batch(processor, -1, rows)
    labels = found.pop("labels")
    likeliest = model.eval()(**found).logits[:, :-1].argmax(-1)
    right = (likeliest == labels[:, 1:]) | (labels[:, 1:] == -100)
    return right.all(1).float().mean().item()


def main(words: Sequence[str] | None = None) -> None:
    """Pretrain, or go on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=32)
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, processor = built()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    state, begun = given.folder / "state.pt", 0
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        begun = saved["step"]
    for step in range(begun + 1, given.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, step / 100, 0.02 + (given.steps - step) / given.steps)
        # of its own seed: a run that goes on sees the drawings that it would have seen
        loss = model.train()(**batch(processor, step, given.batch_size)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % SAVED == 0 or step == given.steps:
            print(
                f"step {step}  loss {loss.item():.3f}  exact {accuracy(model, processor, 200):.2f}"
            )
            for part in (model, processor):
                part.save_pretrained(given.folder)
            values = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**values, "step": step}, state)


if __name__ == "__main__":
    main()
