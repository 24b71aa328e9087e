"""What the GPU kernels of re-attention share: products, rounding, Theta, and what dropout keeps.

Maps lie in device memory as *deviations*: S (A - 1/N) in the type of q, where S is a power of two near N. So
rounding costs a share of what differs from the uniform map, which is all that the norms and the softmax's
gradient look at (docs/decisions/0004-half-precision.md), and half precision neither overflows nor underflows.

A tile of maps is a matrix with the heads as its rows: (HP, columns), HP being H rounded up to a power of two.
To mix heads is then one small product on the tensor cores.

Shapes: N tokens, P padded tokens, H heads, HP padded heads.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# Triton's interpreter runs the kernels on a CPU, for tests. There, products of bfloat16 multiply the bit
# patterns, and float32 is cut to bfloat16 instead of rounded; both are put right below.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# Values of NORM; 0 stands for none.
BATCH = tl.constexpr(1)
LAYER = tl.constexpr(2)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 -> dtype, to the nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    return x.to(dtype)


@triton.jit
def product(left, right):
    """left @ right in float32; of float32 operands to float32's precision, whatever TF32 flags say."""
    if INTERPRETED:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    if left.dtype == tl.float32:
        return tl.dot(left, right, input_precision="tf32x3")
    return tl.dot(left, right)


@triton.jit
def halves(matrix, dtype: tl.constexpr):
    """A float32 matrix as the sum of two of `dtype`: exact to 2^-17 for bfloat16."""
    high = rounded(matrix, dtype)
    return high, rounded(matrix - high.to(tl.float32), dtype)


@triton.jit
def mixed(high, low, maps):
    """(high + low) @ maps."""
    if maps.dtype == tl.float32:
        return product(high, maps)
    return product(high, maps) + product(low, maps)


@triton.jit
def placed(tile, factor):
    """factor times a tile in float32, held by the threads that hold products with it.

    factor is a power of two. That is the product with a multiple of the identity.
    The tensor cores take a tile from
    shared memory, where loads can be under way long before it is needed. A
    change of layout would cost a trip through registers and two barriers instead.
    """
    if tile.dtype == tl.float32:
        return tile * factor
    HP: tl.constexpr = tile.shape[0]
    diagonal = tl.arange(0, HP)[:, None] == tl.arange(0, HP)[None, :]
    return product(tl.where(diagonal, factor, 0.0).to(tile.dtype), tile)


@triton.jit
def theta_by_output(THETA, H: tl.constexpr, HP: tl.constexpr, NORM: tl.constexpr):
    """(HP, HP), rows are output heads; 0 at padding. For LayerNorm less its mean over output heads."""
    g = tl.arange(0, HP)[:, None]
    h = tl.arange(0, HP)[None, :]
    inside = (g < H) & (h < H)
    theta = tl.load(THETA + h * H + g, mask=inside, other=0.0)
    if NORM == LAYER:
        theta = tl.where(inside, theta - tl.sum(theta, 0)[None, :] / H, 0.0)
    return theta


@triton.jit
def theta_by_input(THETA, H: tl.constexpr, HP: tl.constexpr, NORM: tl.constexpr):
    """(HP, HP), rows are input heads; 0 at padding. For LayerNorm less its mean over output heads."""
    h = tl.arange(0, HP)[:, None]
    g = tl.arange(0, HP)[None, :]
    inside = (g < H) & (h < H)
    theta = tl.load(THETA + h * H + g, mask=inside, other=0.0)
    if NORM == LAYER:
        theta = tl.where(inside, theta - tl.sum(theta, 1)[:, None] / H, 0.0)
    return theta


@triton.jit
def constant_of(
    theta, BIAS, uniform, H: tl.constexpr, HP: tl.constexpr, NORM: tl.constexpr, BIASED: tl.constexpr
):
    """(HP,): M where A is uniform, sum_h theta[h, g] uniform + bias[g]. `theta` is by output."""
    constant = tl.sum(theta, 1) * uniform
    if BIASED:
        g = tl.arange(0, HP)
        bias = tl.load(BIAS + g, mask=g < H, other=0.0)
        if NORM == LAYER:
            bias = tl.where(g < H, bias - tl.sum(bias, 0) / H, 0.0)
        constant += bias
    return constant


@triton.jit
def kept(seed, image, i, j, N, keep, H: tl.constexpr, HP: tl.constexpr):
    """Whether dropout keeps each entry: a function of the seed and the entry's place alone. (HP, columns)."""
    h = tl.arange(0, HP)[:, None]
    place = ((image * H + h) * N + i.to(tl.int64)[None, :]) * N + j[None, :]
    return tl.rand(seed, place) < keep


@triton.jit
def dropped(deviations, keeping, inside, level, keep, dtype: tl.constexpr):
    """Deviations of maps -> deviations of maps after dropout. level: S / N, what stands for 1/N."""
    full = tl.where(keeping, (deviations.to(tl.float32) + level) / keep, 0.0) - level
    return rounded(tl.where(inside, full, 0.0), dtype)
