"""Claims on images: merging tokens of a ViT while an adapter trains."""

from claims.claim import Claim, Setting, Statement, around, at_most
from claims.fashion import write_images
from claims.measures import SECONDS

FASHION = Setting(
    name="fashion",
    title="Fashion-MNIST with a ViT of 12 blocks of width 96 and 197 tokens (1 M parameters), "
    "pretrained by the command on 8,000 images of five of the ten classes: 1,200 images of all "
    "classes for training, 400 for validation, 10,000 for the test; four passes in batches of 32",
    overrides=(
        "model=path",
        "model.path={data}/vit",
        "data=image_folder",
        "data.train={data}/train",
        "data.test={data}/test",
        "train.validation_share=0.25",
        "train.epochs=4",
        "train.batch_size=32",
    ),
    rates=around(3e-3),
    limits=(
        "A narrow ViT that has seen 8,000 gray images: a wide one that has seen a million may "
        "give another verdict.",
        "The images are those of the Debian package dataset-fashion-mnist.",
    ),
    write_files=write_images,
)
LORA = "lora"
PYRA = "pyra method.inner=lora"  # the high schedule is the default
MERGED = f"{PYRA} method.reactivate=false"
ALIKE = f"{PYRA} train.lr=3e-3"  # the rate that was chosen for the other two

MERGING = Claim(
    name="pyra",
    title="PYRA with the high schedule keeps the accuracy in half of the time",
    paper="Xiong et al. 2024, arXiv:2403.09192",
    paper_says="ViT-B and ViT-L on VTAB-1k, 1,000 images a task, with LoRA: the high schedule runs "
    "more than three times as fast as all tokens, with a higher accuracy than a smaller model of "
    "that speed and than token merging without training (ToMe); the low schedule loses nothing.",
    statements=(
        Statement("LoRA with PYRA is no worse than LoRA with all tokens", "no_worse", PYRA, LORA),
        Statement("PYRA beats merging without its vectors", "beats", PYRA, MERGED),
        Statement(
            "at the learning rate 3e-3 for all, PYRA is no worse than all tokens",
            "no_worse",
            ALIKE,
            LORA,
        ),
        Statement(
            "at the learning rate 3e-3 for all, PYRA beats merging without its vectors",
            "beats",
            ALIKE,
            MERGED,
        ),
        Statement(
            "merging without its vectors is no worse than all tokens", "no_worse", MERGED, LORA
        ),
        at_most(0.5, SECONDS, "training takes at most half of the time", PYRA, LORA),
    ),
    setting=FASHION,
    labels={
        LORA: "LoRA, all tokens",
        PYRA: "LoRA with PYRA, high schedule",
        MERGED: "LoRA with merging alone, high schedule",
        ALIKE: "LoRA with PYRA, high schedule, at 3e-3",
    },
    pages=("pyra",),
    limits=(
        "The high schedule merges to 5 of 197 tokens. The low one and a smaller model are not "
        "tried; time is the processor time of training, where matching takes its share of a "
        "narrow model.",
        "400 validation images choose between rates with a standard error of 2.4 points. The three "
        "statements at one rate (3e-3) were added after the first two had been seen.",
    ),
)
