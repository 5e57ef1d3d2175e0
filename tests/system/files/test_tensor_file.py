"""Checks of tensors that were read."""

import torch

from petl.system.files.tensor_file import check_index


def test_an_index_points_into_its_table():
    for index in (torch.tensor([0, 2]), torch.empty(0, dtype=torch.long)):
        check_index("rows", index, 3, unique=True)
    check_index("rows", torch.empty(2, dtype=torch.long, device="meta"), 3)  # has no values
