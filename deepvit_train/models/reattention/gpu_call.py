"""One call of re-attention's operator on a GPU: its tensors, and how each kernel is launched.

Heads wider than 32 are widened by zeros to a multiple of 16, those of 33 to 48: rows that are not aligned are
loaded piece by piece. Zeros change no product.

Shapes: B batch, C images of a chunk, N tokens, P padded tokens, H heads, HP padded heads, D widened head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

from deepvit_train.models.reattention import gpu_backward_kernel as backward_kernel
from deepvit_train.models.reattention import gpu_forward_kernel as forward_kernel
from deepvit_train.models.reattention.gpu_plan import Kind, Plan, plan_for
from deepvit_train.models.reattention.norm import Mixing

NUMBERS = (int, float)


class Call:
    """One call of the operator: a method for each kernel. Arguments as those of `gpu.forward`."""

    def __init__(self, q: Tensor, mixing: Mixing, seed: Tensor | None, dropout: float, rows: int) -> None:
        kind = Kind(mixing.norm, mixing.bias is not None, seed is not None)
        self.plan: Plan = plan_for((*q.shape,), q.dtype, kind, rows)
        self.mixing, self.device = mixing, q.device
        self.bias = mixing.theta if mixing.bias is None else mixing.bias  # a kernel wants some address
        self.seed, self.keep = (0, 1.0) if seed is None else (int(seed), 1.0 - dropout)

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor, of float32 if not told otherwise."""
        return torch.empty(shape, dtype=dtype or torch.float32, device=self.device)

    def new_maps(self) -> Tensor:
        """Uninitialised maps of a chunk, (C, H, N, P)."""
        plan = self.plan
        return self.new(plan.chunks[0].stop, plan.heads, plan.tokens, plan.padded, dtype=plan.dtype)

    def rows_whole(self, tensor: Tensor) -> Tensor:
        """The tensor (..., D), copied where D is widened or the entries of a row lie apart in memory."""
        missing = self.plan.head_dim - tensor.shape[-1]
        if missing:
            return F.pad(tensor, (0, missing)).contiguous()  # padding keeps channels last
        return tensor if tensor.stride(-1) == 1 and 0 not in tensor.stride() else tensor.contiguous()

    def narrowed(self, tensor: Tensor) -> Tensor:
        """The tensor (..., D) without the columns that `rows_whole` added."""
        width = self.plan.width
        return tensor if tensor.shape[-1] == width else tensor[..., :width].contiguous()

    @property
    def count(self) -> int:
        """Positions that BatchNorm's statistics are over."""
        ranks = distributed.get_world_size() if self.mixing.norm == "ranks" else 1
        return self.plan.batch * self.plan.tokens**2 * ranks

    def _launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """Launch a kernel with what Triton compiled for it before, if it was launched like this before.

        Triton looks at every argument at every launch, which takes the host longer than all else. The plan
        decides the types; only numbers and the alignment of addresses can differ between its calls.
        """
        launches = self.plan.launches
        aligned = [a if a.__class__ in NUMBERS else a.data_ptr() % 16 for a in arguments]
        key = (id(kernel), self.device, grid, *aligned)
        if (known := launches.get(key)) is not None:
            run, rest = known
            run(*arguments, *rest)
            return
        compiled = launch(kernel, grid, *arguments, **constants)
        seeded = self.plan.kind.dropout and "seed" in kernel.arg_names  # every seed would be a key
        if compiled is not None and not seeded:
            rest = [constants[name] for name in kernel.arg_names[len(arguments) :]]
            launches[key] = compiled[(*grid, 1, 1)[:3]], rest

    def make_maps(self, q: Tensor, k: Tensor, maps: Tensor, log_sums: Tensor) -> None:
        """Softmax maps, and the log2 of their rows' sums."""
        plan = self.plan
        tiles = plan.tiles(plan.maps)
        self._launch(
            forward_kernel.maps_kernel, (len(q) * plan.heads * tiles,),
            q, k, maps, log_sums, *q.stride()[:3], *k.stride()[:3], tiles, plan.tokens, plan.padded,
            plan.exponent_scale, plan.level, plan.scale, **plan.maps,
        )  # fmt: skip

    def mix(self, maps: Tensor, parts: Tensor, first: int) -> None:
        """Mix heads and normalise, in place."""
        plan = self.plan
        self._launch(
            forward_kernel.mix_kernel, (len(parts), plan.mix_programs),
            maps, self.mixing.theta, self.bias, parts, self.seed, first, plan.tokens, plan.padded,
            plan.level, plan.unit, self.mixing.eps, self.keep, **plan.mix,
        )  # fmt: skip

    def find_affine(self, parts: Tensor, affine: Tensor, mean: Tensor, var: Tensor) -> None:
        """Slope and offset of the output, and BatchNorm's statistics."""
        plan, mixing, number = self.plan, self.mixing, parts.shape[0] * parts.shape[1]
        if mixing.norm == "ranks":
            parts, number = parts.double().sum((0, 1)), 1
            distributed.all_reduce(parts)
        self._launch(
            forward_kernel.affine_kernel, (1,),
            parts, mixing.theta, self.bias, mixing.weight, mixing.shift, affine, mean, var,
            number, self.count, plan.uniform, plan.unit, mixing.eps, **plan.affine,
        )  # fmt: skip

    def apply_maps(self, maps: Tensor, v: Tensor, affine: Tensor, out: Tensor, final: bool) -> None:
        """The mixed maps times v; with slope and offset if `final`."""
        plan = self.plan
        tiles = plan.tiles(plan.values)
        self._launch(
            forward_kernel.values_kernel, (len(v) * plan.heads * tiles,),
            maps, v, affine, out, *v.stride()[:3], tiles, plan.tokens, plan.padded,
            FINAL=final, **plan.values,
        )  # fmt: skip

    def find_coefficients(
        self,
        v: Tensor,
        dout: Tensor,
        out: Tensor,
        v_sum: Tensor,
        dout_sum: Tensor,
        statistics: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Sums over tokens into v_sum and dout_sum, (B, H, D).

        Returns numbers per head, (7, HP), and below them a matrix, (HP, HP).
        """
        plan, mixing = self.plan, self.mixing
        parts = self.new(plan.batch, plan.heads, 2)
        self._launch(
            backward_kernel.sums_kernel, (plan.batch * plan.heads,),
            v, dout, out, v_sum, dout_sum, parts,
            *v.stride()[:3], *dout.stride()[:3], *out.stride()[:3], plan.tokens, **plan.sums,
        )  # fmt: skip
        shared = parts
        if mixing.norm == "ranks":
            shared = parts.double().sum(0).T.contiguous()
            distributed.all_reduce(shared)
        coefficients = self.new(
            backward_kernel.ROWS_OF_COEFFICIENTS.value + plan.padded_heads, plan.padded_heads
        )
        self._launch(
            backward_kernel.coefficients_kernel, (1,),
            parts, shared, mixing.theta, self.bias, mixing.weight, mixing.shift, *statistics, coefficients,
            plan.batch, self.count, plan.uniform, plan.unit, mixing.eps,
            SHARED=mixing.norm == "ranks", **plan.coefficients,
        )  # fmt: skip
        return coefficients

    def remap(
        self, inputs: list[Tensor], log_sums: Tensor, v_sum: Tensor, maps: Tensor, grads: Tensor
    ) -> None:
        """Softmax maps again, and the gradient of the normalised maps."""
        plan = self.plan
        tiles = plan.tiles(plan.remap)
        self._launch(
            backward_kernel.remap_kernel, (len(log_sums) * plan.heads * tiles,),
            *inputs, log_sums, v_sum, self.mixing.weight, maps, grads,
            *_strides(inputs), tiles, plan.tokens, plan.padded,
            plan.exponent_scale, plan.level, plan.scale, **plan.remap,
        )  # fmt: skip

    def unmix(
        self, maps: Tensor, grads: Tensor, coefficients: Tensor, products: Tensor, sums: Tensor, first: int
    ) -> None:
        """Maps -> normalised maps, and their gradient -> that of the logits; both in place."""
        plan, mixing = self.plan, self.mixing
        self._launch(
            backward_kernel.unmix_kernel, (len(products), plan.unmix_programs),
            maps, grads, mixing.theta, coefficients, products, sums, self.seed, first,
            plan.tokens, plan.padded, plan.level, plan.unit, mixing.eps, self.keep, **plan.unmix,
        )  # fmt: skip

    def find_gradients(
        self,
        maps: Tensor,
        grads: Tensor,
        inputs: list[Tensor],
        dout_sum: Tensor,
        coefficients: Tensor,
        targets: list[Tensor],
    ) -> None:
        """The gradients of q, k and v, and parts of that of the norm's weight."""
        plan, mixing = self.plan, self.mixing
        tiles = plan.tiles(plan.gradients)
        self._launch(
            backward_kernel.gradients_kernel, (len(dout_sum) * plan.heads * tiles,),
            maps, grads, *inputs, dout_sum, mixing.weight, mixing.shift, coefficients, *targets,
            *_strides(inputs), tiles, plan.tokens, plan.padded, plan.logit_scale, **plan.gradients,
        )  # fmt: skip

    def add_up(
        self, products: Tensor, sums: Tensor, dweight: Tensor, coefficients: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradients of theta, bias, weight and shift from their parts."""
        plan = self.plan
        small = self.new(plan.heads), self.new(plan.heads), self.new(plan.heads)
        found = self.new(plan.heads, plan.heads), *small
        self._launch(
            backward_kernel.totals_kernel, (plan.heads,),
            products, sums, dweight, coefficients, self.mixing.theta, self.mixing.weight, *found,
            plan.batch * products.shape[1], plan.batch * dweight.shape[1], plan.uniform, plan.unit,
            **plan.totals,
        )  # fmt: skip
        return found


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> Any:
    """Launch a kernel by Triton, which compiles it if it is new. Tests put their own function in this place.

    Returns what Triton compiled, and None in Triton's interpreter, which compiles nothing.
    """
    return kernel[grid](*arguments, **constants)


def _strides(tensors: list[Tensor]) -> list[int]:
    """How far images, heads and tokens of each tensor lie apart, in entries."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]
