"""The GPU kernels of re-attention on the GPU at hand: whether they are right, and what they cost.

    python -m scripts.bench_gpu [--out FILE.json] [--batch 128] [SECTION ...]

    check     errors against the formula in float64, and whether two runs give the same bits
    kernels   device time of each kernel
    tiles     device time of each kernel over other tiles than the chosen ones
    operator  the operator with its gradient beside fused plain attention, and what the host needs for it
    step      training steps and inference of whole models, beside timm's plain ViT of the same shape
    compiled  the same, compiled
    graphs    the same, compiled into CUDA graphs

It needs torch, Triton, timm and PyYAML alone: it runs where the rest of deepvit-train's packages is missing.
Times of kernels are the profiler's. Times of steps are medians of turns that the contenders take.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from deepvit_train.config.model import Stem
from deepvit_train.config.preset import Architecture, attention_preset, model_preset
from deepvit_train.models import DeepViT
from deepvit_train.models.reattention import HeadMixer, gpu, operator, plain_reattention, reattention
from deepvit_train.models.reattention.gpu_plan import Plan, plan_for
from deepvit_train.models.reattention.norm import Mixing

DEVICE = torch.device("cuda")
found: dict[str, Any] = {}

WITHOUT_KERNELS = "re-attention in torch's operations"

Shape = tuple[int, int, int, int]  # images, heads, tokens, head_dim

MAIN: Shape = (128, 12, 197, 32)
SHAPES: list[tuple[str, Shape]] = [
    ("batch", MAIN),
    ("layer", MAIN),
    ("none", MAIN),
    ("batch", (128, 12, 197, 64)),
    ("batch", (128, 12, 197, 33)),
    ("batch", (128, 6, 197, 64)),
    ("batch", (64, 12, 577, 32)),
]
TILES: dict[str, list[dict[str, int]]] = {
    "maps": [{"ROWS": 128}, {"COLUMNS": 64}, {"num_stages": 3}],
    "mix": [{"COLUMNS": 256}, {"STEPS": 4}, {"num_stages": 2}],
    "values": [{"ROWS": 64}, {"COLUMNS": 64}],
    "remap": [{"ROWS": 128}, {"COLUMNS": 32}, {"num_stages": 2}],
    "unmix": [{"num_stages": 3}, {"ROWS": 16}, {"maxnreg": 168}, {"num_warps": 8, "SLICES": 8}],
    "gradients": [{"ROWS": 64}, {"COLUMNS": 64}, {"num_stages": 2}],
}


def say(name: str, value: Any) -> None:
    """Print a figure and keep it for the record."""
    found[name] = value
    print(f"{name}: {value}", flush=True)


def build_inputs(shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v (B, H, N, K) as the projection gives them, with logits of deviation 0.25, and dout."""
    batch, heads, tokens, head_dim = shape
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, device=DEVICE)
    qkv[:, :, :2] *= 0.5
    dout = torch.randn(batch, tokens, heads, head_dim, device=DEVICE).to(dtype)
    return [each.transpose(1, 2) for each in (*qkv.to(dtype).unbind(2), dout)]


def build_norm(name: str, heads: int) -> nn.BatchNorm2d | nn.LayerNorm | None:
    """A norm in training mode, with weights that leave no term out."""
    if name == "none":
        return None
    norm = (nn.BatchNorm2d if name == "batch" else nn.LayerNorm)(heads).to(DEVICE)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    return norm


def check(_: argparse.Namespace) -> None:
    """Print errors relative to float64 of out, dq, dk, dv, dtheta, dbias, dweight and dshift."""
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for name in ("batch", "layer", "none"):
            _check_one(name, dtype, (2, 12, 197, 32))
    _check_one("batch", torch.bfloat16, (2, 12, 577, 33))


def _check_one(name: str, dtype: torch.dtype, shape: Shape) -> None:
    heads, norm = shape[1], build_norm(name, shape[1])
    q, k, v, dout = build_inputs(shape, dtype)
    theta = (torch.rand(heads, heads, device=DEVICE) * 2 - 1) * heads**-0.5
    bias = torch.randn(heads, device=DEVICE)

    def results(function: Callable[..., Tensor], full: torch.dtype | None) -> list[Tensor]:
        leaves = [t.detach().to(full or t.dtype).requires_grad_() for t in (q, k, v, theta, bias)]
        own = build_norm(name, heads)
        if own is not None and norm is not None:
            own.load_state_dict(norm.state_dict())
            own = own.to(full or torch.float32)
        out = function(*leaves[:3], HeadMixer(leaves[3], leaves[4], own))
        wanted = leaves[:4] if name == "batch" else leaves  # BatchNorm cancels the bias
        parameters = [] if own is None else list(own.parameters())
        return [out.detach(), *torch.autograd.grad(out, [*wanted, *parameters], dout.to(out.dtype))]

    truth = results(plain_reattention, torch.float64)
    got, again = (results(reattention, None) for _ in range(2))
    pairs = zip(got, truth, strict=True)
    errors = [((one.double() - other).norm() / other.norm()).item() for one, other in pairs]
    same = all(torch.equal(one, other) for one, other in zip(got, again, strict=True))
    kind = f"{name} {str(dtype).removeprefix('torch.')} {shape[2]} tokens, heads of {shape[3]}"
    say(f"errors, {kind}", [f"{error:.1e}" for error in errors] + ["same bits" if same else "OTHER BITS"])


def kernels(_: argparse.Namespace) -> None:
    """Print the device time of each kernel."""
    for name, shape in SHAPES:
        say(f"us, {name} {shape}", kernel_times(name, shape))


def kernel_times(name: str, shape: Shape) -> dict[str, float]:
    """Device microseconds that each kernel needs for a forward and a backward pass, from medians of five."""
    heads = shape[1]
    q, k, v, dout = build_inputs(shape, torch.bfloat16)
    theta, ones = torch.randn(heads, heads, device=DEVICE) * heads**-0.5, torch.ones(heads, device=DEVICE)
    mixing = Mixing(theta, ones, ones, ones, name, 1e-5)

    def both() -> None:
        out, log_sums, mean, var = gpu.forward(q, k, v, mixing, None, 0.0, 0)
        gpu.backward(dout, out, log_sums, (mean, var), (q, k, v), mixing, (None, 0.0), 0)

    for _ in range(3):
        both()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(5):
            both()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events() or []:
        times[event.name.partition("(")[0][:40]].append(event.device_time)
    per_call = {kernel: statistics.median(each) * len(each) / 5 for kernel, each in times.items()}
    rounded = {kernel: round(value, 1) for kernel, value in per_call.items() if value >= 1}
    return rounded | {"sum": round(sum(per_call.values()), 1)}


def tiles(_: argparse.Namespace) -> None:
    """Print the device time of each kernel over other tiles."""
    chosen = Plan._choose_tiles
    for kernel, choices in TILES.items():
        for name, choice in [(name, choice) for name in ("batch", "layer") for choice in ({}, *choices)]:

            def changed(self: Plan, kernel: str = kernel, choice: dict[str, int] = choice) -> None:
                chosen(self)
                getattr(self, kernel).update(choice)

            plan_for.cache_clear()
            Plan._choose_tiles = changed
            try:
                times = kernel_times(name, MAIN)
                say(f"us, {name} {kernel} {choice or 'as chosen'}", times[f"{kernel}_kernel"])
            except Exception as error:  # a tile that does not fit the card
                say(f"us, {name} {kernel} {choice}", repr(error)[:120])
            finally:
                Plan._choose_tiles = chosen
                plan_for.cache_clear()


def _clock(function: Callable[[], Any], count: int, wait: bool) -> float:
    """Milliseconds a call, of `count` calls in a row: of the host, or with `wait` of host and device."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        function()
    if wait:
        torch.cuda.synchronize()
    taken = 1e3 * (time.perf_counter() - start) / count
    torch.cuda.synchronize()
    return taken


def attention_calls(images: int) -> dict[str, Callable[[], Tensor]]:
    """Fused plain attention and re-attention on the same q, k, v."""
    q, k, v, _ = build_inputs((images, *MAIN[1:]), torch.bfloat16)
    q, k, v = (each.detach().requires_grad_() for each in (q, k, v))
    theta, bias = torch.randn(12, 12, device=DEVICE).requires_grad_(), torch.zeros(12, device=DEVICE)
    norm = build_norm("batch", 12)
    return {
        "plain": lambda: F.scaled_dot_product_attention(q, k, v),
        "re-attention": lambda: reattention(q, k, v, HeadMixer(theta, bias.requires_grad_(), norm)),
    }


def operator_section(options: argparse.Namespace) -> None:
    """Print milliseconds of forward, and of forward and backward together; at 2 images it is the host's."""
    for images in (options.batch, 2):
        for name, call in attention_calls(images).items():

            def both(call: Callable[[], Tensor] = call) -> None:
                out = call()
                out.backward(out)

            for _ in range(5):
                both()
            forward = statistics.median(_clock(call, 10, wait=True) for _ in range(5))
            together = statistics.median(_clock(both, 10, wait=True) for _ in range(5))
            say(f"ms, {name} attention of {images} images", [round(forward, 3), round(together, 3)])


def timm_of(architecture: Architecture) -> nn.Module:
    """timm's plain ViT of the same shape."""
    model = architecture.model
    return VisionTransformer(
        img_size=model.image_size,
        patch_size=model.patch_size,
        embed_dim=model.dim,
        depth=model.depth,
        num_heads=model.heads,
        mlp_ratio=model.mlp_ratio,
        drop_path_rate=model.drop_path,
    )


def shape_of(name: str) -> Architecture:
    """A preset's architecture, or that of ViT-B with re-attention."""
    if name != "vit_b":
        return model_preset(name)
    own = model_preset("deepvit_16b")
    return replace(own, model=replace(own.model, dim=768, depth=12, heads=12, mlp_ratio=4.0))


def build_models(name: str) -> dict[str, Callable[[], nn.Module]]:
    """What is compared at a preset's shape."""
    own = shape_of(name)
    plain = Architecture(own.model, attention_preset("self"))
    models: dict[str, Callable[[], nn.Module]] = {}
    if own.model.stem == Stem.conv:
        models["timm"] = partial(timm_of, own)
    models |= {"plain": partial(DeepViT, plain, 1000), "re-attention": partial(DeepViT, own, 1000)}
    if name == "deepvit_16b":
        layer = Architecture(own.model, attention_preset("reattention_vit_pytorch"))
        models["re-attention, vit-pytorch's form"] = partial(DeepViT, layer, 1000)
        models[WITHOUT_KERNELS] = partial(DeepViT, own, 1000)
        try:
            from vit_pytorch.deepvit import DeepViT as VitPytorch

            size = {"image_size": 224, "patch_size": 16, "num_classes": 1000, "dim": 384, "depth": 16}
            models["vit-pytorch"] = partial(VitPytorch, **size, heads=12, mlp_dim=1152, dim_head=32)
        except ImportError:
            print("vit-pytorch is not installed: left out")
    return models


def step(options: argparse.Namespace, mode: str | None = None) -> None:
    """Print milliseconds of a training step with its optimizer, of inference, and the largest memory."""
    for name in options.models.split(","):
        torch.compiler.reset()  # each code is compiled eight times at most
        models = {kind: build().to(DEVICE) for kind, build in build_models(name).items()}
        if mode is not None:
            models.pop(WITHOUT_KERNELS, None)
        size = shape_of(name).model.image_size
        images = torch.randn(options.batch, 3, size, size, device=DEVICE)
        targets = torch.randint(1000, (options.batch,), device=DEVICE)
        steps = {}
        for kind, model in models.items():
            called = model if mode is None else torch.compile(model, mode=mode)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            calls = [partial(_train, called, optimizer, images, targets), partial(_infer, called, images)]
            steps[kind] = (
                [partial(_without_kernels, call) for call in calls] if kind == WITHOUT_KERNELS else calls
            )
        _take_turns(f"{name}, {mode or 'eager'}", models, steps, options.rounds)
        del models, steps
        gc.collect()
        torch.cuda.empty_cache()


def _train(model: Any, optimizer: torch.optim.Optimizer, images: Tensor, targets: Tensor) -> None:
    with torch.autocast("cuda", torch.bfloat16):
        logits = model(images)
    F.cross_entropy(logits.float(), targets).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _without_kernels(call: Callable[[], None]) -> None:
    with mock.patch.object(operator, "gpu_kernels", return_value=None):
        call()


def _infer(model: Any, images: Tensor) -> None:
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        model(images)


def _take_turns(title: str, models: dict[str, nn.Module], steps: dict[str, Any], rounds: int) -> None:
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    peaks: dict[str, float] = {}
    for turn in range(rounds + 1):
        for kind, (train, infer) in steps.items():
            for what, call in (("train", train), ("infer", infer)):
                models[kind].train(what == "train")
                if not turn:  # compile and warm up
                    for _ in range(4):
                        call()
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                    base = torch.cuda.memory_allocated()
                    call()
                    torch.cuda.synchronize()
                    if what == "train":
                        peaks[kind] = (torch.cuda.max_memory_allocated() - base) / 2**30
                else:
                    times[kind, what].append(_clock(call, 4, wait=True))
    medians = {key: statistics.median(each) for key, each in times.items()}
    first = next(iter(steps))
    for kind in steps:
        parts = [
            f"{what} {medians[kind, what]:.1f} ms ({medians[kind, what] / medians[first, what]:.2f})"
            for what in ("train", "infer")
        ]
        say(f"{title}, {kind}", f"{', '.join(parts)}, {peaks[kind]:.2f} GiB")


SECTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "check": check,
    "kernels": kernels,
    "tiles": tiles,
    "operator": operator_section,
    "step": step,
    "compiled": partial(step, mode="default"),
    "graphs": partial(step, mode="reduce-overhead"),
}


def main() -> None:
    """Run the sections that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], default=[])
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--batch", type=int, default=128, help="images of a step")
    parser.add_argument("--rounds", type=int, default=7, help="turns that the contenders take")
    parser.add_argument("--models", default="deepvit_16b,deepvit_s,deepvit_l,vit_b", help="presets of `step`")
    options = parser.parse_args()
    say("card", [torch.cuda.get_device_name(), torch.__version__, triton.__version__])
    for section in options.sections or ["check", "kernels", "operator", "step"]:
        SECTIONS[section](options)
        if options.out is not None:
            options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
