"""Show that memory is reused when nothing refers to it any more, and not before."""

from __future__ import annotations

import torch

from deepvit_train.data.memory import ALIGNMENT, ReusedMemory

SHAPE = (4, 3, 5, 5)


def test_memory_in_use_is_left_alone_whoever_uses_it() -> None:
    memory = ReusedMemory(2)
    weight = torch.ones(5, requires_grad=True)
    holders = {
        "itself": lambda given: given,
        "a view": lambda given: given[1:, 0],
        "an alias": lambda given: given.detach().data,
        "an array": lambda given: given.numpy()[0],
        "autograd": lambda given: (given * weight).sum(),
    }
    for name, hold in holders.items():
        held = hold(memory.empty(SHAPE, torch.float32).fill_(1.0))
        for _ in range(3):
            memory.empty(SHAPE, torch.float32).fill_(2.0)
        if name == "autograd":
            weight.grad = None
            held.backward()
            held = weight.grad / 60
        assert float(held.max()) == 1.0, name


def test_memory_that_is_free_is_used_again() -> None:
    memory = ReusedMemory(2)
    first = memory.empty(SHAPE, torch.float32)
    place = first.data_ptr()
    assert place % ALIGNMENT == 0
    second = memory.empty(SHAPE, torch.float32)
    assert second.data_ptr() != place
    del first
    smaller = memory.empty((2, 3, 5, 5), torch.float32)
    assert smaller.data_ptr() == place
    assert smaller.is_contiguous()
    larger = memory.empty((8, 3, 5, 5), torch.float32)  # fits in none that is kept
    assert larger.data_ptr() not in (place, second.data_ptr())
