"""Re-attention's backward pass on a GPU, as six kernels; three of them for a chunk of images at a time.

    sums          v, dout, out  -> sums over tokens, and sum(dout out)       one head of an image a program
    coefficients  sums          -> what the norm's gradient subtracts        one program
    remap         q, k, v, dout -> S (A - 1/N), and dX                       one head's queries a program
    unmix         both          -> X and dS in their places                  all heads, some queries a program
    gradients     X, dS, ...    -> dq, dk, dv, part of dweight               one head's tokens a program
    totals        parts         -> dTheta, dbias, dweight, dshift            one row of Theta a program

Every sum is taken in a fixed order and nothing is added atomically, so two runs give the same bits.

dX is the gradient of X in out = (weight X + shift) v, dM that of M, dS that of the logits. Without dropout,
and not for LayerNorm, what is the same along a row of dX reaches neither dS nor dTheta. There v less its mean
over tokens stands for v, so that rounding costs a share of what matters.

Shapes: B batch, C images of a chunk, N tokens, P padded tokens, H heads, HP padded heads, D head_dim,
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
    placed,
    product,
    rounded,
    theta_by_input,
    theta_by_output,
)

# The rows of COEFFICIENTS, (7, HP).
ALONG = tl.constexpr(0)  # BatchNorm: mean(dX X), for what Theta^T makes of scaled maps instead of X
DX_MEAN = tl.constexpr(1)  # BatchNorm under dropout: what else is to be subtracted from dX
UNIFORM = tl.constexpr(2)  # LayerNorm: M where A is uniform
INVERSE = tl.constexpr(3)  # 1 / deviation: BatchNorm's, LayerNorm's where A is uniform; else 1
SLOPE = tl.constexpr(4)  # X = SLOPE (what `unmix` leaves in the place of maps) + CONSTANT
CONSTANT = tl.constexpr(5)
TOKEN_SUMS = tl.constexpr(6)  # sum of (sum of v) (sum of dout): the gradient of shift
ROWS_OF_COEFFICIENTS = tl.constexpr(7)
# After them, (HP, HP): BatchNorm's A -> what mean(dX X) X adds to dA.


@triton.jit
def sums_kernel(
    V, DOUT, OUT, V_SUM, DOUT_SUM, PARTS,
    v_image, v_head, v_token, g_image, g_head, g_token, o_image, o_head, o_token, N,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """V_SUM, DOUT_SUM (B, H, D): sums over tokens. PARTS (B, H, 2): V_SUM . DOUT_SUM, and sum(dout out)."""
    pair = tl.program_id(0).to(tl.int64)
    image, head = pair // H, pair % H
    d = tl.arange(0, DP)
    v_sum = tl.zeros((DP,), tl.float32)
    dout_sum = tl.zeros((DP,), tl.float32)
    both = tl.zeros((DP,), tl.float32)
    for start in range(0, N, ROWS):
        i = start + tl.arange(0, ROWS)[:, None]
        inside = (i < N) & (d[None, :] < D)
        v = tl.load(V + image * v_image + head * v_head + i * v_token + d[None, :], mask=inside, other=0.0)
        g = tl.load(DOUT + image * g_image + head * g_head + i * g_token + d[None, :], mask=inside, other=0.0)
        o = tl.load(OUT + image * o_image + head * o_head + i * o_token + d[None, :], mask=inside, other=0.0)
        v_sum += tl.sum(v.to(tl.float32), 0)
        dout_sum += tl.sum(g.to(tl.float32), 0)
        both += tl.sum(g.to(tl.float32) * o.to(tl.float32), 0)
    tl.store(V_SUM + pair * D + d, v_sum, mask=d < D)
    tl.store(DOUT_SUM + pair * D + d, dout_sum, mask=d < D)
    tl.store(PARTS + pair * 2, tl.sum(v_sum * dout_sum, 0))
    tl.store(PARTS + pair * 2 + 1, tl.sum(both, 0))


@triton.jit(do_not_specialize=["images", "count"])
def coefficients_kernel(
    PARTS, STATISTICS, THETA, BIAS, WEIGHT, SHIFT, MEAN, VAR, COEFFICIENTS, images, count, uniform, unit, eps,
    H: tl.constexpr, HP: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, BIASED: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """COEFFICIENTS (7 + HP, HP) float32, whose rows are named above.

    PARTS (images, H, 2), of this rank; STATISTICS (2, H) float64, of all ranks, where SHARED.
    """
    g = tl.arange(0, HP)
    real = g < H
    zero = tl.zeros((HP,), tl.float32)
    token_sums = tl.zeros((HP,), tl.float64)
    dots = tl.zeros((HP,), tl.float64)
    for start in range(0, images, ROWS):
        image = start + tl.arange(0, ROWS)[:, None]
        inside = (image < images) & real[None, :]
        part = PARTS + (image * H + g[None, :]) * 2
        token_sums += tl.sum(tl.load(part, mask=inside, other=0.0).to(tl.float64), 0)
        dots += tl.sum(tl.load(part + 1, mask=inside, other=0.0).to(tl.float64), 0)
    tl.store(COEFFICIENTS + TOKEN_SUMS * HP + g, token_sums.to(tl.float32))
    weight = tl.load(WEIGHT + g, mask=real, other=0.0)
    shift = tl.load(SHIFT + g, mask=real, other=0.0)
    theta = theta_by_output(THETA, H, HP, NORM)
    along, dx_mean, m_at_uniform, inverse, slope = zero, zero, zero, zero + 1.0, zero + unit
    if NORM == BATCH:
        if SHARED:
            token_sums = tl.load(STATISTICS + g, mask=real, other=0.0)
            dots = tl.load(STATISTICS + H + g, mask=real, other=0.0)
        inverse = 1.0 / tl.sqrt(tl.load(VAR + g, mask=real, other=0.0) + eps)
        slope = inverse * unit
        # X where A is uniform: 0 but under dropout, whose rows of maps do not sum to 1.
        constant = (tl.sum(theta, 1) * uniform - tl.load(MEAN + g, mask=real, other=0.0)) * inverse
        mean_of_product = ((dots - shift.to(tl.float64) * token_sums) / count.to(tl.float64)).to(tl.float32)
        along = mean_of_product * slope
        dx_mean = (weight.to(tl.float64) * token_sums / count.to(tl.float64)).to(tl.float32)
        dx_mean += mean_of_product * constant
        back = theta_by_input(THETA, H, HP, NORM) * (-inverse * along)[None, :]
        square = (ROWS_OF_COEFFICIENTS + g[:, None]) * HP + g[None, :]
        tl.store(COEFFICIENTS + square, product(back, theta))
    else:
        constant = constant_of(theta, BIAS, uniform, H, HP, NORM, BIASED)
        if NORM == LAYER:
            m_at_uniform = constant
            inverse = zero + tl.rsqrt(tl.sum(constant * constant, 0) / H + eps)
            constant = constant * inverse
            slope = zero + 1.0
    tl.store(COEFFICIENTS + ALONG * HP + g, along)
    tl.store(COEFFICIENTS + DX_MEAN * HP + g, dx_mean)
    tl.store(COEFFICIENTS + UNIFORM * HP + g, m_at_uniform)
    tl.store(COEFFICIENTS + INVERSE * HP + g, inverse)
    tl.store(COEFFICIENTS + SLOPE * HP + g, slope)
    tl.store(COEFFICIENTS + CONSTANT * HP + g, constant)


@triton.jit
def remap_kernel(
    Q, K, V, DOUT, LOG_SUMS, V_SUM, WEIGHT, MAPS, GRADS,
    q_image, q_head, q_token, k_image, k_head, k_token, v_image, v_head, v_token, g_image, g_head, g_token,
    tiles, N, P, scale, level, S,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CENTRED: tl.constexpr,
):  # fmt: skip
    """MAPS (C, H, N, P) = S (softmax - 1/N) again; GRADS (C, H, N, P) = dX = weight dout v^T, less its rows'
    means if CENTRED; both 0 at padding."""
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    image, head = pair // H, pair % H
    i = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    rows = (i[:, None] < N) & (d[None, :] < D)
    q = tl.load(Q + image * q_image + head * q_head + i[:, None] * q_token + d[None, :], mask=rows, other=0.0)
    g = tl.load(
        DOUT + image * g_image + head * g_head + i[:, None] * g_token + d[None, :], mask=rows, other=0.0
    )
    weight = tl.load(WEIGHT + head)
    log_sums = tl.load(LOG_SUMS + pair * N + i, mask=i < N, other=0.0)
    centre = tl.zeros((ROWS,), tl.float32)
    if CENTRED:
        v_mean = tl.load(V_SUM + pair * D + d, mask=d < D, other=0.0) / N
        centre = tl.sum(g.to(tl.float32) * v_mean[None, :], 1)
    for start in range(0, P, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        inside = (j[:, None] < N) & (d[None, :] < D)
        place = pair * N * P + i[:, None] * P + j[None, :]
        written = (i[:, None] < N) & (j[None, :] < P)
        k = tl.load(
            K + image * k_image + head * k_head + j[:, None] * k_token + d[None, :], mask=inside, other=0.0
        )
        a = tl.exp2(product(q, tl.trans(k)) * scale - log_sums[:, None]) * S - level
        a = rounded(tl.where(j[None, :] < N, a, 0.0), MAPS.dtype.element_ty)
        tl.store(MAPS + place, a, mask=written)
        v = tl.load(
            V + image * v_image + head * v_head + j[:, None] * v_token + d[None, :], mask=inside, other=0.0
        )
        dx = weight * (product(g, tl.trans(v)) - centre[:, None])
        dx = rounded(tl.where(j[None, :] < N, dx, 0.0), GRADS.dtype.element_ty)
        tl.store(GRADS + place, dx, mask=written)


@triton.jit
def through_layer_norm(m, dx, COEFFICIENTS, deviation, unit, eps, H: tl.constexpr, HP: tl.constexpr):
    """m = Theta^T S (A - 1/N), and dX -> X less CONSTANT, and dM / INVERSE; (HP, columns) each.

    dM itself can be too large for half precision. deviation: 1 / INVERSE.
    """
    h = tl.arange(0, HP)
    m = m * unit + tl.load(COEFFICIENTS + UNIFORM * HP + h)[:, None]
    inverse = tl.rsqrt(tl.sum(m * m, 0) / H + eps)[None, :]
    x = m * inverse
    dm = (dx - x * (tl.sum(dx * x, 0) / H)[None, :]) * (inverse * deviation)
    return x - tl.load(COEFFICIENTS + CONSTANT * HP + h)[:, None], dm


@triton.jit
def sliced(tile, SLICES: tl.constexpr):
    """(HP, columns) -> (SLICES, HP, columns / SLICES): a product over columns, shared out among the warps."""
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1]
    return tl.trans(tl.reshape(tile, (rows, SLICES, columns // SLICES)), 1, 0, 2)


@triton.jit(do_not_specialize=["seed", "first"])
def unmix_kernel(
    MAPS, GRADS, THETA, COEFFICIENTS, PRODUCTS, SUMS, seed, first, N, P, level, unit, eps, keep,
    H: tl.constexpr, HP: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, ONCE: tl.constexpr,
    SLICES: tl.constexpr, NORM: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """MAPS (C, H, N, P): S (A - 1/N) -> (X - CONSTANT) / SLOPE. GRADS: dX -> dS. For ROWS queries.

    ONCE: a row fits into COLUMNS; else its keys are gone over twice, first for delta = sum_j A dA.

    BatchNorm's dM = (dX - mean(dX X) X) / deviation is never formed. Rounded to dX's type it would lose what
    is subtracted, which is small beside dX, and yet counts in dTheta. What dM is needed for is linear in dX
    and A.

    PRODUCTS (C, programs, 2, HP, HP), a = S (A - 1/N): a dX^T, for LayerNorm a (dM / INVERSE)^T; and for
    BatchNorm a a^T. SUMS (C, programs, HP): of dM / INVERSE for LayerNorm, of a for BatchNorm under dropout.
    """
    image = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, HP)
    square = h[:, None] * HP + h[None, :]
    dtype: tl.constexpr = MAPS.dtype.element_ty
    inverse = tl.load(COEFFICIENTS + INVERSE * HP + h)
    forth_high, forth_low = halves(theta_by_output(THETA, H, HP, NORM), dtype)
    back = theta_by_input(THETA, H, HP, NORM) * inverse[None, :]
    back_high, back_low = halves(back, dtype)
    if NORM == BATCH:
        along = rounded(tl.load(COEFFICIENTS + ROWS_OF_COEFFICIENTS * HP + square), dtype)
        lost = tl.sum(back * tl.load(COEFFICIENTS + DX_MEAN * HP + h)[None, :], 1)
    if NORM == LAYER:
        deviation = 1.0 / tl.load(COEFFICIENTS + INVERSE * HP)
    cross = tl.zeros((SLICES, HP, HP), tl.float32)
    own = tl.zeros((SLICES, HP, HP), tl.float32)
    sums = tl.zeros((HP,), tl.float32)
    for row in range(0, ROWS):
        i = tl.program_id(1) * ROWS + row
        places = (image * H + h[:, None]) * N * P + i * P
        delta = tl.zeros((HP,), tl.float32)
        for turn in tl.static_range(0, 1 if ONCE else 2):
            for start in range(0, P, COLUMNS):
                j = start + tl.arange(0, COLUMNS)
                inside = (h[:, None] < H) & (j[None, :] < P) & (i < N)
                whole = tl.load(MAPS + places + j[None, :], mask=inside, other=0.0)
                a = whole
                if DROPOUT:
                    real = inside & (j[None, :] < N)
                    keeping = real & kept(seed, first + image, i + tl.zeros_like(j), j, N, keep, H, HP)
                    a = dropped(whole, keeping, real, level, keep, dtype)
                dx = tl.load(GRADS + places + j[None, :], mask=inside, other=0.0)
                x = mixed(forth_high, forth_low, a)
                if NORM == LAYER:
                    x, dm = through_layer_norm(x, placed(dx, 1.0), COEFFICIENTS, deviation, unit, eps, H, HP)
                    if ONCE or turn == 1:
                        sums += tl.sum(dm, 1)
                    dx = rounded(dm, dtype)
                da = mixed(back_high, back_low, dx)
                if NORM == BATCH:
                    da += product(along, a)
                    if DROPOUT:
                        da -= lost[:, None]
                # A and what dropout leaves of it. At padding A counts as 1/N, and dA is 0.
                full = placed(whole, unit) + level * unit
                left = tl.where(keeping, full / keep, 0.0) if DROPOUT else full
                if ONCE or turn == 0:
                    delta += tl.sum(left * da, 1)
                if ONCE or turn == 1:
                    cross += product(sliced(a, SLICES), tl.trans(sliced(dx, SLICES), 0, 2, 1))
                    if NORM == BATCH:
                        own += product(sliced(a, SLICES), tl.trans(sliced(a, SLICES), 0, 2, 1))
                    if DROPOUT and NORM == BATCH:
                        sums += tl.sum(placed(a, 1.0), 1)
                    tl.store(MAPS + places + j[None, :], rounded(x, dtype), mask=inside)
                    ds = left * da - full * delta[:, None] if DROPOUT else full * (da - delta[:, None])
                    tl.store(GRADS + places + j[None, :], rounded(ds, dtype), mask=inside)
    part = image * tl.num_programs(1) + tl.program_id(1)
    tl.store(PRODUCTS + part * 2 * HP * HP + square, tl.sum(cross, 0))
    if NORM == BATCH:
        tl.store(PRODUCTS + (part * 2 + 1) * HP * HP + square, tl.sum(own, 0))
    tl.store(SUMS + part * HP + h, sums)


@triton.jit
def gradients_kernel(
    MAPS, GRADS, Q, K, V, DOUT, DOUT_SUM, WEIGHT, SHIFT, COEFFICIENTS, DQ, DK, DV, DWEIGHT,
    q_image, q_head, q_token, k_image, k_head, k_token, v_image, v_head, v_token, g_image, g_head, g_token,
    tiles, N, P, scale,
    H: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """DQ, DK, DV (C, H, N, D) of ROWS tokens of a head; DWEIGHT (C, programs, HP): parts of weight's."""
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    image, head = pair // H, pair % H
    tile = tl.program_id(0) % tiles
    own = tile * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    own_real = (own[:, None] < N) & (d[None, :] < D)
    target = (pair * N + own[:, None]) * D + d[None, :]

    # The own tokens as queries: dq = dS k / sqrt(D).
    total = tl.zeros((ROWS, DP), tl.float32)
    for start in range(0, P, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        place = pair * N * P + own[:, None] * P + j[None, :]
        ds = tl.load(GRADS + place, mask=(own[:, None] < N) & (j[None, :] < P), other=0.0)
        key = K + image * k_image + head * k_head + j[:, None] * k_token + d[None, :]
        total += product(ds, tl.load(key, mask=(j[:, None] < N) & (d[None, :] < D), other=0.0))
    tl.store(DQ + target, rounded(total * scale, DQ.dtype.element_ty), mask=own_real)

    # The own tokens as keys: dk = dS^T q / sqrt(D), dv = (weight X + shift)^T dout.
    total = tl.zeros((ROWS, DP), tl.float32)
    dv = tl.zeros((ROWS, DP), tl.float32)
    for start in range(0, N, COLUMNS):
        i = start + tl.arange(0, COLUMNS)
        place = pair * N * P + i[:, None] * P + own[None, :]
        inside = (i[:, None] < N) & (own[None, :] < P)
        rows = (i[:, None] < N) & (d[None, :] < D)
        ds = tl.load(GRADS + place, mask=inside, other=0.0)
        query = Q + image * q_image + head * q_head + i[:, None] * q_token + d[None, :]
        total += product(tl.trans(ds), tl.load(query, mask=rows, other=0.0))
        x = tl.load(MAPS + place, mask=inside, other=0.0)
        dout = DOUT + image * g_image + head * g_head + i[:, None] * g_token + d[None, :]
        dv += product(tl.trans(x), tl.load(dout, mask=rows, other=0.0))
    tl.store(DK + target, rounded(total * scale, DK.dtype.element_ty), mask=own_real)
    dout_sum = tl.load(DOUT_SUM + pair * D + d, mask=d < D, other=0.0)[None, :]
    dv = (
        tl.load(COEFFICIENTS + SLOPE * HP + head) * dv
        + tl.load(COEFFICIENTS + CONSTANT * HP + head) * dout_sum
    )
    value = V + image * v_image + head * v_head + own[:, None] * v_token + d[None, :]
    along = tl.sum(tl.load(value, mask=own_real, other=0.0).to(tl.float32) * dv, 1)
    tl.store(DWEIGHT + (image * tiles + tile) * HP + head, tl.sum(along, 0))
    dv = tl.load(WEIGHT + head) * dv + tl.load(SHIFT + head) * dout_sum
    tl.store(DV + target, rounded(dv, DV.dtype.element_ty), mask=own_real)


@triton.jit
def total_of(PARTS, parts, stride, HP: tl.constexpr, ROWS: tl.constexpr):
    """The sum over `parts` rows of HP numbers, `stride` apart, in float64."""
    g = tl.arange(0, HP)
    total = tl.zeros((HP,), tl.float64)
    for start in range(0, parts, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        total += tl.sum(
            tl.load(PARTS + row * stride + g[None, :], mask=row < parts, other=0.0).to(tl.float64), 0
        )
    return total


@triton.jit(do_not_specialize=["parts", "dweight_parts"])
def totals_kernel(
    PRODUCTS, SUMS, DWEIGHT_PARTS, COEFFICIENTS, THETA, WEIGHT, DTHETA, DBIAS, DWEIGHT, DSHIFT,
    parts, dweight_parts, uniform, unit,
    H: tl.constexpr, HP: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """DTHETA (H, H), one row a program; DBIAS, DWEIGHT, DSHIFT (H,) by the first program."""
    h = tl.program_id(0)
    g = tl.arange(0, HP)
    real = g < H
    token_sums = tl.load(COEFFICIENTS + TOKEN_SUMS * HP + g)
    inverse = tl.load(COEFFICIENTS + INVERSE * HP + g)
    row = total_of(PRODUCTS + h * HP, parts, 2 * HP * HP, HP, ROWS).to(tl.float32)
    dbias = tl.zeros((HP,), tl.float32)
    if NORM == BATCH:
        # a dM^T = (a dX^T - (a a^T) Theta mean(dX X)) / deviation
        own = total_of(PRODUCTS + (HP + h) * HP, parts, 2 * HP * HP, HP, ROWS).to(tl.float32)
        along = tl.load(COEFFICIENTS + ALONG * HP + g)
        row -= along * tl.sum(theta_by_output(THETA, H, HP, NORM) * own[None, :], 1)
        if DROPOUT:
            sums = total_of(SUMS, parts, HP, HP, ROWS).to(tl.float32)
            row -= tl.sum(tl.where(g == h, sums, 0.0), 0) * tl.load(COEFFICIENTS + DX_MEAN * HP + g)
    elif NORM == LAYER:
        dbias = total_of(SUMS, parts, HP, HP, ROWS).to(tl.float32) * inverse
    else:
        dbias = tl.load(WEIGHT + g, mask=real, other=0.0) * token_sums
    row = row * unit * inverse + dbias * uniform
    if NORM == LAYER:
        row -= tl.sum(tl.where(real, row, 0.0), 0) / H
        dbias -= tl.sum(tl.where(real, dbias, 0.0), 0) / H
    tl.store(DTHETA + h * H + g, row, mask=real)
    if h == 0:
        tl.store(DBIAS + g, dbias, mask=real)
        dweight = total_of(DWEIGHT_PARTS, dweight_parts, HP, HP, ROWS)
        tl.store(DWEIGHT + g, dweight.to(tl.float32), mask=real)
        tl.store(DSHIFT + g, token_sums, mask=real)
