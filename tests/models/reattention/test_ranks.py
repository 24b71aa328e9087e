"""Show that BatchNorm over the batches of two processes is BatchNorm over both batches in one."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn

from deepvit_train.models.reattention import HeadMixer, reattention
from tests.conftest import forked

HEADS, TOKENS, HEAD_DIM = 3, 7, 5


def gradients(images: Tensor, dout: Tensor, dropout: float = 0.0, sync: bool = False) -> dict[str, Tensor]:
    """Output, gradients and running statistics for q, k, v side by side in `images` (B, H, N, 3 K)."""
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(HEADS).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    theta = torch.randn(HEADS, HEADS, dtype=torch.float64, requires_grad=True)
    images = images.clone().requires_grad_()
    mixer = HeadMixer(theta, norm=norm)
    out = reattention(*images.chunk(3, dim=-1), mixer, dropout=dropout, sync=sync)
    out.backward(dout)
    found = {"out": out, "images": images.grad, "theta": theta.grad, "weight": norm.weight.grad}
    found |= {"bias": norm.bias.grad, "mean": norm.running_mean, "var": norm.running_var}
    return {name: value.detach().contiguous() for name, value in found.items() if value is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_two_processes_have_the_statistics_and_gradients_of_one(tmp_path: Path, dropout: float) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, HEADS, TOKENS, 3 * HEAD_DIM, dtype=torch.float64)
    dout = torch.randn(4, HEADS, TOKENS, HEAD_DIM, dtype=torch.float64)

    def rank(number: int) -> None:
        store = f"file://{tmp_path / 'store'}"
        distributed.init_process_group(
            "gloo", init_method=store, rank=number, world_size=2, timeout=timedelta(seconds=60)
        )
        mine = slice(2 * number, 2 * number + 2)
        save_file(gradients(images[mine], dout[mine], dropout, sync=True), tmp_path / f"{number}.safetensors")
        distributed.destroy_process_group()

    assert forked(lambda: rank(0), lambda: rank(1)) == 0
    first, second = (load_file(tmp_path / f"{number}.safetensors") for number in (0, 1))
    for name in ("mean", "var"):
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
    if dropout:
        return  # other masks than one process draws; the gradients are those below, the statistics agree
    whole = gradients(images, dout)
    for name in ("out", "images"):
        torch.testing.assert_close(torch.cat([first[name], second[name]]), whole[name])
    for name in ("theta", "weight", "bias"):
        torch.testing.assert_close(first[name] + second[name], whole[name])
    for name in ("mean", "var"):
        torch.testing.assert_close(first[name], whole[name])
