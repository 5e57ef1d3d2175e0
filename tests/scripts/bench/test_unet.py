"""The section of diffusion U-Nets: its ratios are of the same model with LoRA."""

import pytest
from bench.records import Result
from bench.report import tables
from bench.unet import measure

pytest.importorskip("diffusers")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_tuners_of_skips_keep_less_than_lora_whatever_their_ratio():
    small = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "cross_attention_dim": 8,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    full, quarter = found = measure(2, **small)
    assert full.counts["kept / LoRA"] == quarter.counts["kept / LoRA"] < 0.8
    channels = (16, 8, 8, 8)
    assert full.counts["parameters"] == sum(2 * c * c + 2 * c for c in channels)
    (table,) = tables(Result({}, found)).values()
    assert [row[0] for row in table.rows] == [full.row, quarter.row]
