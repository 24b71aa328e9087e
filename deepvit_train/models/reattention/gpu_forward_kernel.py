"""Re-attention's forward pass on a GPU, as four kernels for a chunk of images.

    maps    q, k        -> S (A - 1/N) and the log2 of each row's sum        one head's queries a program
    mix     maps        -> X less a constant of its head, in place           all heads, some columns a program
    affine  squares     -> slope and offset of each head                     one program
    values  maps, v     -> out = slope (map v) + offset (sum of v)           one head's queries a program

Shapes: C images of a chunk, N tokens, P padded tokens, H heads, HP padded heads, D head_dim,
DP padded head_dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deepvit_train.models.reattention.gpu_part import (
    BATCH,
    LAYER,
    constant_of,
    dropped,
    halves,
    kept,
    mixed,
    product,
    rounded,
    theta_by_output,
)


@triton.jit
def maps_kernel(
    Q, K, MAPS, LOG_SUMS, q_image, q_head, q_token, k_image, k_head, k_token, tiles, N, P, scale, level, S,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ONCE: tl.constexpr,
):  # fmt: skip
    """MAPS (C, H, N, P) = S (softmax - 1/N), 0 at padding; LOG_SUMS (C, H, N). scale: log2(e) / sqrt(D).

    ONCE: a row fits into COLUMNS; else its keys are gone over twice, first for the rows' sums.
    """
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    image, head = pair // H, pair % H
    i = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    q = tl.load(
        Q + image * q_image + head * q_head + i[:, None] * q_token + d[None, :],
        mask=(i[:, None] < N) & (d[None, :] < D),
        other=0.0,
    )
    keys = K + image * k_image + head * k_head
    most = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, N, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        inside = (j[:, None] < N) & (d[None, :] < D)
        k = tl.load(keys + j[:, None] * k_token + d[None, :], mask=inside, other=0.0)
        logits = tl.where(j[None, :] < N, product(q, tl.trans(k)) * scale, -1e30)
        higher = tl.maximum(most, tl.max(logits, 1))
        a = tl.exp2(logits - higher[:, None])
        total = total * tl.exp2(most - higher) + tl.sum(a, 1)
        most = higher
        if ONCE:
            a = tl.where(j[None, :] < N, a * (S / total)[:, None] - level, 0.0)
            tl.store(
                MAPS + pair * N * P + i[:, None] * P + j[None, :],
                rounded(a, MAPS.dtype.element_ty),
                mask=(i[:, None] < N) & (j[None, :] < P),
            )
    log_sums = most + tl.log2(total)
    tl.store(LOG_SUMS + pair * N + i, log_sums, mask=i < N)
    if not ONCE:
        for start in range(0, P, COLUMNS):
            j = start + tl.arange(0, COLUMNS)
            inside = (j[:, None] < N) & (d[None, :] < D)
            k = tl.load(keys + j[:, None] * k_token + d[None, :], mask=inside, other=0.0)
            a = tl.exp2(product(q, tl.trans(k)) * scale - log_sums[:, None]) * S - level
            tl.store(
                MAPS + pair * N * P + i[:, None] * P + j[None, :],
                rounded(tl.where(j[None, :] < N, a, 0.0), MAPS.dtype.element_ty),
                mask=(i[:, None] < N) & (j[None, :] < P),
            )


@triton.jit(do_not_specialize=["seed", "first"])
def mix_kernel(
    MAPS, THETA, BIAS, PARTS, seed, first, N, P, level, unit, eps, keep,
    H: tl.constexpr, HP: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
    NORM: tl.constexpr, BIASED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Mix the heads of MAPS (C, H, N, P) in place; `first` is the chunk's first image, `unit` is 1 / S.

    None and BatchNorm: S times Theta^T (A - 1/N). LayerNorm: X less what it is where A is uniform.
    PARTS (C, programs, 2, HP): for BatchNorm the sums of squares and, under dropout, the sums.
    """
    image = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, HP)
    theta = theta_by_output(THETA, H, HP, NORM)
    high, low = halves(theta, MAPS.dtype.element_ty)
    if NORM == LAYER:
        constant = constant_of(theta, BIAS, level * unit, H, HP, NORM, BIASED)
        at_uniform = constant * tl.rsqrt(tl.sum(constant * constant, 0) / H + eps)
    squares = tl.zeros((HP,), tl.float32)
    sums = tl.zeros((HP,), tl.float32)
    for step in range(0, STEPS):
        c = (tl.program_id(1) * STEPS + step) * COLUMNS + tl.arange(0, COLUMNS)
        place = MAPS + (image * H + h[:, None]) * N * P + c[None, :]
        inside = (h[:, None] < H) & (c[None, :] < N * P)
        a = tl.load(place, mask=inside, other=0.0)
        if DROPOUT:
            j = c % P
            keeping = kept(seed, first + image, c // P, j, N, keep, H, HP)
            a = dropped(a, keeping, inside & (j[None, :] < N), level, keep, MAPS.dtype.element_ty)
        x = mixed(high, low, a)
        if NORM == BATCH:
            squares += tl.sum(x * x, 1)
            if DROPOUT:
                sums += tl.sum(x, 1)
        if NORM == LAYER:
            x = x * unit + constant[:, None]
            x = x * tl.rsqrt(tl.sum(x * x, 0) / H + eps)[None, :] - at_uniform[:, None]
        tl.store(place, rounded(x, MAPS.dtype.element_ty), mask=inside)
    if NORM == BATCH:
        part = PARTS + (image * tl.num_programs(1) + tl.program_id(1)) * 2 * HP + h
        tl.store(part, squares)
        if DROPOUT:
            tl.store(part + HP, sums)


@triton.jit(do_not_specialize=["parts", "count"])
def affine_kernel(
    PARTS, THETA, BIAS, WEIGHT, SHIFT, AFFINE, MEAN, VAR, parts, count, uniform, unit, eps,
    H: tl.constexpr, HP: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, BIASED: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """AFFINE (2, HP): slope and offset such that out = slope (what `mix` left) v + offset (sum of v).

    MEAN, VAR (H,): BatchNorm's, of M less its bias, from PARTS (parts, 2, HP) over `count` positions.
    """
    g = tl.arange(0, HP)
    real = g < H
    theta = theta_by_output(THETA, H, HP, NORM)
    weight = tl.load(WEIGHT + g, mask=real, other=0.0)
    offset = tl.load(SHIFT + g, mask=real, other=0.0)
    if NORM == BATCH:
        squares = tl.zeros((HP,), tl.float64)
        sums = tl.zeros((HP,), tl.float64)
        for start in range(0, parts, ROWS):
            row = start + tl.arange(0, ROWS)[:, None]
            part = PARTS + row * 2 * HP + g[None, :]
            squares += tl.sum(tl.load(part, mask=row < parts, other=0.0).to(tl.float64), 0)
            if DROPOUT:
                sums += tl.sum(tl.load(part + HP, mask=row < parts, other=0.0).to(tl.float64), 0)
        rest = sums / count.to(tl.float64) * unit
        var = (squares / count.to(tl.float64) * unit * unit - rest * rest).to(tl.float32)
        rest = rest.to(tl.float32)
        inverse = 1.0 / tl.sqrt(var + eps)
        tl.store(MEAN + g, tl.sum(theta, 1) * uniform + rest, mask=real)
        tl.store(VAR + g, var, mask=real)
        slope = weight * inverse * unit
        offset -= weight * inverse * rest
    else:
        constant = constant_of(theta, BIAS, uniform, H, HP, NORM, BIASED)
        slope = weight * unit
        if NORM == LAYER:
            constant = constant * tl.rsqrt(tl.sum(constant * constant, 0) / H + eps)
            slope = weight
        offset += weight * constant
    tl.store(AFFINE + g, slope)
    tl.store(AFFINE + HP + g, offset)


@triton.jit
def values_kernel(
    MAPS, V, AFFINE, OUT, v_image, v_head, v_token, tiles, N, P,
    H: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """OUT (C, N, H, D) = slope MAPS v + offset (sum of v); MAPS v alone if not FINAL."""
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    image, head = pair // H, pair % H
    i = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    out = tl.zeros((ROWS, DP), tl.float32)
    v_sum = tl.zeros((DP,), tl.float32)
    for start in range(0, P, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        x = tl.load(
            MAPS + pair * N * P + i[:, None] * P + j[None, :],
            mask=(i[:, None] < N) & (j[None, :] < P),
            other=0.0,
        )
        v = tl.load(
            V + image * v_image + head * v_head + j[:, None] * v_token + d[None, :],
            mask=(j[:, None] < N) & (d[None, :] < D),
            other=0.0,
        )
        out += product(x, v)
        if FINAL:
            v_sum += tl.sum(v.to(tl.float32), 0)
    if FINAL:
        out = out * tl.load(AFFINE + head) + v_sum[None, :] * tl.load(AFFINE + HP + head)
    place = OUT + ((image * N + i[:, None]) * H + head) * D + d[None, :]
    tl.store(place, rounded(out, OUT.dtype.element_ty), mask=(i[:, None] < N) & (d[None, :] < D))
