import random

import numpy as np
import torch

from petl.system.random_states import restore, states, states_kept

CPU = torch.device("cpu")


def draw():
    return torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist()


def test_generators_go_on_where_they_were():
    saved = states(CPU)
    first = draw()
    restore(saved, CPU)
    with states_kept():
        assert draw() == first
    assert draw() == first
