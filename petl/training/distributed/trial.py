"""How long a step takes in bfloat16: a trial of about a second, whose result is kept on disk."""

import logging
import time
from functools import cache
from pathlib import Path

import torch
import xxhash
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertModel

from petl.efficiency.rewrite import apply_rewrites
from petl.errors import InputError
from petl.system.files.disk import as_json, write_atomic
from petl.system.files.paths import cache_folder
from petl.system.files.read import read_json
from petl.training.runs.environment import device_name, processor_name

HEAD, WIDEST = 32, 1024  # width of an attention head; of a block: a wider one gains as much
ON_CPU, ELSEWHERE = (8, 32), (8, 512)  # texts, and tokens of each
SECONDS, ROUNDS = 1.0, 5  # about so long; at least so many steps of each precision
PLAUSIBLE = (0.02, 50.0)  # fractions outside of it come from a damaged file, not from a clock
logger = logging.getLogger(__name__)


@cache
def share_of_float32(width: int, device: torch.device) -> float:
    """Return the time of a step of LoRA in bfloat16 as a fraction of that in float32.

    It is measured once for each width, device and version of torch, so that all runs of a machine
    choose alike.

    Args:
        width: of the model's states; the steps are those of two encoder blocks of this width.
    """
    width = max(HEAD, min(width, WIDEST) // HEAD * HEAD)
    about = (width, device_name(device), processor_name(), torch.get_num_threads())
    how = (SECONDS, ROUNDS, torch.__version__)
    key = xxhash.xxh3_128_hexdigest(repr((*about, *how)).encode())
    file = cache_folder() / "precision" / f"{key}.json"
    known = _kept(file)
    if known is not None:
        return known
    found = measure(width, device)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, as_json({"fraction": found}))
    except OSError as error:
        logger.info("the trial of bfloat16 is not kept: %s (%s)", file, error.strerror)
    return found


def _kept(file: Path) -> float | None:
    """Return the result of an earlier trial; None without one that can be read and used."""
    try:
        if not file.exists():
            return None
        fraction = read_json(file, dict[str, float])["fraction"]
    except OSError as error:  # such as another user's folder
        logger.info("%s cannot be read (%s): measuring again", file, error.strerror)
        return None
    except (InputError, KeyError) as error:
        logger.warning("%s is damaged (%s): measuring again", file, error)
        return None
    if PLAUSIBLE[0] <= fraction <= PLAUSIBLE[1]:
        return fraction
    logger.warning("%s is damaged (fraction is %s): measuring again", file, fraction)
    return None


def measure(width: int, device: torch.device) -> float:
    """Return the time of a step in bfloat16 as a fraction of that in float32.

    Args:
        width: a multiple of `HEAD`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _model(width).to(device)
        shape = ON_CPU if device.type == "cpu" else ELSEWHERE
        tokens = torch.randint(model.config.vocab_size, shape).to(device)

        # of a processor that other work keeps busy, the seconds that are spent here
        clock = time.process_time if device.type == "cpu" else time.perf_counter

        def step(*, bf16: bool) -> float:
            begun = clock()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                states = model(input_ids=tokens).last_hidden_state
            states.float().sum().backward()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            return clock() - begun

        for bf16 in (True, False):  # weights are cast, kernels are chosen
            step(bf16=bf16)
        # by the same clock: on a busy machine as many steps as on an idle one
        end, pairs = clock() + SECONDS, []
        while len(pairs) < ROUNDS or clock() < end:
            pairs.append((step(bf16=True), step(bf16=False)))
    half, full = map(min, zip(*pairs, strict=True))  # the least disturbed of each
    return half / full


def _model(width: int) -> PeftModel:
    """Return two encoder blocks with LoRA, as `petl train` computes it."""
    config = BertConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=width // HEAD,
    )
    model = get_peft_model(BertModel(config), LoraConfig(r=8, target_modules="all-linear"))
    apply_rewrites(model, {"fuse_lora": True, "cast_once": True})
    return model.train()
