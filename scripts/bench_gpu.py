"""The GPU kernels of re-attention on the GPU at hand: right, the same twice, and how long each takes.

    python -m scripts.bench_gpu [--out FOLDER] [SECTION ...]        sections: check, kernels, operator, step

Needs torch, Triton and timm alone, so that it runs on a machine without the rest of deepvit-train's packages.
Kernel times are the profiler's device times; those of operators and steps are medians of interleaved calls.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from deepvit_train.models.reattention import gpu, plain_reattention, reattention
from deepvit_train.models.reattention.gpu_plan import Plan, plan_for
from deepvit_train.models.reattention.norm import Mixing
from deepvit_train.models.reattention.operator import operator as operator_of

DEVICE = torch.device("cuda")
FOUND: dict[str, Any] = {}


def say(name: str, value: Any) -> None:
    """Print a figure and keep it for the record."""
    FOUND[name] = value
    print(f"{name}: {value}", flush=True)


def inputs(batch: int, heads: int, tokens: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v (B, H, N, K) as the projection gives them, with logits of deviation 0.25, and dout."""
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, device=DEVICE)
    qkv[:, :, :2] *= 0.5
    dout = torch.randn(batch, tokens, heads, head_dim, device=DEVICE).to(dtype)
    return [each.transpose(1, 2) for each in (*qkv.to(dtype).unbind(2), dout)]


def build_norm(name: str, heads: int) -> nn.Module | None:
    """A training-mode norm with weights that leave no term out."""
    if name == "none":
        return None
    norm = (nn.BatchNorm2d if name == "batch" else nn.LayerNorm)(heads).to(DEVICE)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    return norm


def check() -> None:
    """Errors against the formula in float64, and two runs of the same bits."""
    torch.manual_seed(0)
    for dtype in (torch.bfloat16,):
        for name in ("batch", "layer", "none"):
            _check_one(name, dtype, (2, 12, 197, 32))
        _check_one("batch", dtype, (2, 12, 577, 33))


def _check_one(name: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    heads, norm = shape[1], build_norm(name, shape[1])
    q, k, v, dout = inputs(*shape, dtype)
    theta = (torch.rand(heads, heads, device=DEVICE) * 2 - 1) * heads**-0.5
    bias = torch.randn(heads, device=DEVICE)

    def gradients(function: Callable[..., Tensor], double: bool) -> list[Tensor]:
        leaves = [t.detach() for t in (q, k, v, theta, bias)]
        leaves = [(t.double() if double else t).requires_grad_() for t in leaves]
        own = None if norm is None else build_norm(name, heads)
        if own is not None:
            own.load_state_dict(norm.state_dict())
            own = own.double() if double else own
        out = function(*leaves, own)
        parameters = [] if own is None else [own.weight, own.bias]
        wanted = [leaf for leaf in leaves if name != "batch" or leaf is not leaves[4]] + parameters
        return [out.detach(), *torch.autograd.grad(out, wanted, dout.to(out.dtype))]

    truth, got, again = gradients(plain_reattention, True), *(gradients(reattention, False) for _ in range(2))
    errors = [((g.double() - t).norm() / t.norm()).item() for g, t in zip(got, truth, strict=True)]
    same = all(torch.equal(one, other) for one, other in zip(got, again, strict=True))
    label = f"{name} {str(dtype)[6:]} {shape[2]} tokens of {shape[3]}"
    say(f"errors {label}", [f"{error:.1e}" for error in errors] + ["same bits" if same else "OTHER BITS"])


def kernels() -> None:
    """Device time of each kernel, over tile sizes."""
    for name, shape in (
        ("batch", (128, 12, 197, 32)),
    ):  # fmt: skip
        say(f"us {name} {shape}", kernel_times(name, shape))


def kernel_times(name: str, shape: tuple[int, int, int, int], **changes: Any) -> dict[str, float]:
    """Device microseconds of each kernel in a forward and a backward pass, median of five."""
    heads = shape[1]
    q, k, v, dout = inputs(*shape, torch.bfloat16)
    theta, ones = torch.randn(heads, heads, device=DEVICE) * heads**-0.5, torch.ones(heads, device=DEVICE)
    mixing = Mixing(theta, ones, ones, ones, name, 1e-5)

    def both() -> None:
        out, log_sums, *found = gpu.forward(q, k, v, mixing, None, 0.0, 0)
        gpu.backward(dout, out, log_sums, tuple(found), (q, k, v), mixing, (None, 0.0), 0)

    for _ in range(3):
        both()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(5):
            both()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        times[event.name[:40]].append(event.device_time)
    sums = {kernel: statistics.median(each) * len(each) / 5 for kernel, each in times.items()}
    return {kernel: round(value, 1) for kernel, value in sums.items() if value >= 1} | {
        "sum": round(sum(sums.values()), 1)
    }


def tiles() -> None:
    """Device time of the kernels over other tiles than the chosen ones."""
    chosen = Plan._choose_tiles
    for kernel, choices in TILES.items():
        for name, choice in choices:

            def changed(plan: Plan, kernel: str = kernel, choice: dict[str, int] = choice) -> None:
                chosen(plan)
                getattr(plan, kernel).update(choice)

            plan_for.cache_clear()
            Plan._choose_tiles = changed  # type: ignore[method-assign]
            try:
                found = kernel_times(name, (128, 12, 197, 32))
                own = {key: value for key, value in found.items() if key.startswith(kernel)}
                say(f"us {name} {choice}", own)
            except Exception as error:
                print(kernel, choice, repr(error)[:300])
            finally:
                Plan._choose_tiles = chosen  # type: ignore[method-assign]
                plan_for.cache_clear()


TILES: dict[str, list[tuple[str, dict[str, int]]]] = {
    "unmix": [
        (norm, choice)
        for norm in ("batch", "layer")
        for choice in ({"num_stages": 2, "maxnreg": 255}, {"num_stages": 3, "maxnreg": 255}, {"num_stages": 2}, {"num_stages": 3}, {"num_stages": 1})
    ],
}  # fmt: skip


def host() -> None:
    """Where the host's time goes in a forward and a backward pass of the operator."""
    q, k, v, dout = inputs(2, 12, 197, 32, torch.bfloat16)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    theta, norm = torch.randn(12, 12, device=DEVICE).requires_grad_(), nn.BatchNorm2d(12).to(DEVICE)
    for _ in range(5):
        reattention(*leaves, theta, None, norm).backward(dout)
    spent: dict[str, float] = defaultdict(float)

    def timed(owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return plain(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - start

        setattr(owner, name, wrapper)

    both = lambda: reattention(*leaves, theta, None, norm).backward(dout)  # noqa: E731
    say("host us, both", 1e3 * host_ms(both, 30))
    timed(gpu, "forward"), timed(gpu, "backward"), timed(gpu, "launch")
    import deepvit_train.models.reattention.operator as module
    import deepvit_train.models.reattention.formula as formula

    (
        timed(module, "operator_backward"),
        timed(formula, "operator"),
        timed(formula, "_update_running_statistics"),
    )
    for _ in range(3):
        spent.clear()
        start = time.perf_counter()
        forward = 0.0
        for _ in range(30):
            one = time.perf_counter()
            out = reattention(*leaves, theta, None, norm)
            forward += time.perf_counter() - one
            out.backward(dout)
        total = time.perf_counter() - start
        torch.cuda.synchronize()
        say(
            "host us, parts",
            {k: round(1e6 * v / 30) for k, v in {**spent, "forward_all": forward, "total": total}.items()},
        )

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any, theta: Any, weight: Any, shift: Any) -> Any:
            out, *rest = gpu.forward(q, k, v, Mixing(theta, None, weight, shift, "batch", 1e-5), None, 0.0, 0)
            ctx.save_for_backward(q, k, v, theta, weight, shift, out, *rest)
            return out

        @staticmethod
        def backward(ctx: Any, dout: Any) -> Any:
            q, k, v, theta, weight, shift, out, sums, *rest = ctx.saved_tensors
            mixing = Mixing(theta, None, weight, shift, "batch", 1e-5)
            found = gpu.backward(dout, out, sums, tuple(rest), (q, k, v), mixing, (None, 0.0), 0)
            return (*found[:4], found[5], found[6])

    direct = lambda: Direct.apply(*leaves, theta, norm.weight, norm.bias).backward(dout)  # noqa: E731
    for _ in range(3):
        say("host us, both, autograd.Function", 1e3 * host_ms(direct, 30))
        say("host us, both", 1e3 * host_ms(both, 30))
        say(
            "host us, sdpa both",
            1e3 * host_ms(lambda: F.scaled_dot_product_attention(*leaves).backward(dout), 30),
        )


def clock(function: Callable[[], Any], count: int) -> float:
    """Milliseconds a call, queue and device together, of `count` calls in a row."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        function()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / count


def host_ms(function: Callable[[], Any], count: int = 20) -> float:
    """Milliseconds that the host needs to queue a call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        function()
    found = 1e3 * (time.perf_counter() - start) / count
    torch.cuda.synchronize()
    return found


def operator() -> None:
    """The operator with its autograd, beside fused plain attention: time, and host time at a small batch."""
    for batch in (128, 2):
        q, k, v, dout = inputs(batch, 12, 197, 32, torch.bfloat16)
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        theta = torch.randn(12, 12, device=DEVICE).requires_grad_()
        norm = nn.BatchNorm2d(12).to(DEVICE)
        calls = {
            "sdpa": lambda: F.scaled_dot_product_attention(*leaves),
            "reattention": lambda: reattention(*leaves, theta, None, norm),
        }
        for name, call in calls.items():
            for _ in range(3):
                call().backward(dout)
            forward = min(clock(lambda: call().detach(), 10) for _ in range(3))
            both = min(clock(lambda: call().backward(dout), 10) for _ in range(3))
            say(f"{name} at {batch} images: forward, both ms", [round(forward, 3), round(both, 3)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", default=["check", "kernels", "operator"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    say("card", [torch.cuda.get_device_name(), torch.__version__, triton.__version__])
    for section in options.sections:
        globals()[section]()
    if options.out is not None:
        (options.out / "bench_gpu.json").write_text(json.dumps(FOUND, indent=1) + "\n")
