"""Plans in Triton: sums of each vector in, coefficients out, in float64.

The mathematics is that of onsphere/optim/updates (geodesic, per_vector, per_coordinate) and of
onsphere/optim/steps/project.py, and so are the names; every number
here is a tensor with one entry per vector of a tile.
"""

import triton
import triton.language as tl

# Columns of the table.
POINT, SLOPE, MOMENTUM, SQUARE, RADIUS, SECOND = (tl.constexpr(i) for i in range(6))
VECTORS, LENGTH, TASK, VECTOR, INDEX, COLUMNS = (tl.constexpr(i) for i in range(6, 12))
# Shared numbers.
RATE, GIVEN, GROWTH, TOLERANCE, FLOOR = (tl.constexpr(i) for i in range(5))
# Flags; an update that is neither diagonal nor a restoration is linear.
DIAGONAL, RESTORE, MOVING, PER_VECTOR, ROTATION = (tl.constexpr(1 << i) for i in range(5))
EXPONENTIAL, ASCEND, BRAKE, CENTERED = (tl.constexpr(1 << i) for i in range(5, 9))
# What motion.Limits says of float32: below LEAST squares have lost digits.
STEEP, LEAST = tl.constexpr(0.3), tl.constexpr(1.1754943508222875e-38 / 2**-23)
ENOUGH, SMALL_TURN = tl.constexpr(0.1), tl.constexpr(1e-4)
TINY = tl.constexpr(1.1754943508222875e-38)
BFLOAT16, ALIGNED, RELATIVE = (tl.constexpr(1 << i) for i in range(9, 12))


@triton.jit
def factors_of(factors, number):
    """Return the eight numbers of a tensor's update."""
    return [tl.load(factors + (1 + number) * 8 + i) for i in (0, 1, 2, 3, 4, 5, 6, 7)]


@triton.jit
def _own(table, number, column: tl.constexpr):
    """Address what each vector owns: one float32 per vector."""
    return tl.load(table + number * COLUMNS + column).to(tl.pointer_type(tl.float32))


@triton.jit
def _share_of_news(fresh, momentum, decay):
    """``motion.share_of_news``."""
    share = tl.sqrt(fresh / momentum) / tl.maximum(1.0 - decay, 1e-6)
    return tl.where(momentum > 0, share, 1.0)


@triton.jit
def _move(s, n, pp, tt, ht, whole, radius, share, least, relative, FLAGS: tl.constexpr):
    """``step_coefficients`` and ``leave_resting`` of ``motion``; ``relative`` divides a rate."""
    length, size = tl.sqrt(pp), tl.sqrt(tt)
    if ROTATION & FLAGS:
        angle = s[RATE] * tl.minimum(share / ENOUGH, 1.0)
        needed = tl.maximum(angle * angle / (1.0 + angle * angle) * STEEP, s[FLOOR])
        seen = whole > least
    else:
        per_size = 1.0 / (relative if RELATIVE & FLAGS else radius)
        angle = s[RATE] * size * per_size
        needed = angle * angle / (1.0 + angle * angle) * STEEP
        seen = (whole > least) | (s[RATE] * tl.sqrt(least) * per_size < SMALL_TURN)
    moving = (angle > 0) & seen & (tt > needed * whole)
    angle = tl.where(moving, angle, 0.0)
    over = tl.where(moving, angle / size, 0.0)
    if (ROTATION | EXPONENTIAL) & FLAGS:
        cosine = tl.cos(angle)
        sine = tl.where(moving, tl.sin(angle) / angle, 1.0) * over
    else:
        cosine = 1.0 / tl.sqrt(1.0 + angle * angle)
        sine = cosine * over
    moving = moving & (n != 1)  # a vector of one entry never turns
    a = tl.where(n == 1, 1.0, cosine) * radius / length
    b = tl.where(moving, -sine * radius, 0.0)
    if EXPONENTIAL & FLAGS:
        half = tl.sin(angle / 2) / angle * over
        d, e = ht * sine / length, -2 * half * half * ht
    else:
        onto = -b * ht / (radius * radius)
        d, e = onto * a, onto * b
    a = tl.where((b == 0) & (tl.abs(a - 1.0) <= s[TOLERANCE]), 1.0, a)
    return a, b, tl.where(moving, d, 0.0), tl.where(moving, e, 0.0)


@triton.jit
def _radius_of(s, radius, pp, fine):
    """``motion.record``: rounded as it is stored."""
    wanted = tl.where(s[GIVEN] > 0, s[GIVEN], tl.sqrt(pp)).to(tl.float32).to(tl.float64)
    return tl.where((radius == 0) & fine, wanted, radius)


@triton.jit
def _refused(s, n, gg, tt, whole, least, b, FLAGS: tl.constexpr):
    """``motion.refusals``."""
    asked = tt > s[FLOOR] * whole
    if ROTATION & FLAGS:
        asked = asked | (whole <= least)
    return asked & (gg > 0) & (b == 0) & (n > 1) & (s[RATE] > 0)


@triton.jit
def _plan_linear(s, a, n, x, radius, second, FLAGS: tl.constexpr):
    sign = -1.0 if ASCEND & FLAGS else 1.0
    pp, pg, pm, raw_gg, raw_gm, raw_mm = x[0], sign * x[1], x[2], x[3], sign * x[4], x[5]
    least = n * LEAST
    fine = ((pp + pg + pm + raw_gg + raw_gm + raw_mm) * 0 == 0) & (pp > least)
    radius = _radius_of(s, radius, pp, fine)
    gamma, mu = pg / pp, pm / pp
    gg, gm = tl.maximum(raw_gg - pg * gamma, 0.0), raw_gm - pg * mu
    mm = tl.maximum(raw_mm - pm * mu, 0.0)
    alpha, kappa, u, w = a[0], a[1], a[2], a[3]
    if PER_VECTOR & FLAGS:
        ahead = (a[4] * second + (1.0 - a[4]) * gg / n).to(tl.float32).to(tl.float64)
        second = tl.where(fine, ahead, second)
        scale = a[5] * tl.sqrt(tl.maximum(second, TINY)) + a[6]
        u, w = u / scale, w / scale
        relative = a[7]
    else:
        relative = a[7] * a[7] / radius
    tt = tl.maximum(u * u * gg + 2 * u * w * gm + w * w * mm, 0.0)
    raw = u * u * raw_gg + 2 * u * w * raw_gm + w * w * raw_mm
    ht = u * kappa * gg + (u * alpha + w * kappa) * gm + w * alpha * mm
    momentum = kappa * kappa * gg + 2 * kappa * alpha * gm + alpha * alpha * mm
    share = _share_of_news(kappa * kappa * gg, momentum, alpha)
    least = least * (u * u + w * w)
    to_p, b, d, e = _move(s, n, pp, tt, ht, raw, radius, share, least, relative, FLAGS)
    of_g, of_m = kappa + e * u, alpha + e * w
    radial, carried = to_p - b * (u * gamma + w * mu), d - of_g * gamma - of_m * mu
    refused = _refused(s, n, raw_gg, tt, raw, least, b, FLAGS)
    return (radial, sign * b * u, b * w, carried, sign * of_g, of_m), fine, refused, radius, second


@triton.jit
def _plan_diagonal(s, a, n, x, radius, second, FLAGS: tl.constexpr):
    pp, pu, uu, gg = x[0], x[1], x[2], x[3]
    least = n * LEAST
    fine = ((pp + pu + uu + gg + x[4]) * 0 == 0) & (pp > least)
    radius = _radius_of(s, radius, pp, fine)
    rho = pu / pp
    tt, zero = tl.maximum(uu - pu * rho, 0.0), pp * 0
    share = _share_of_news(x[4], uu, a[0])
    to_p, b, _, _ = _move(s, n, pp, tt, zero, uu, radius, share, least, a[7], FLAGS)
    refused = _refused(s, n, gg, tt, uu, least, b, FLAGS)
    return (to_p - b * rho, b, zero, zero, zero, zero), fine, refused, radius, second


@triton.jit
def _plan_restore(s, n, x, radius, second, FLAGS: tl.constexpr):
    """What restoration.py does; a vector without a radius goes back to zero, where it was."""
    mean = x[1] / n if CENTERED & FLAGS else x[1] * 0
    pp = x[0] - n * mean * mean
    size, known = tl.sqrt(pp), radius != 0
    usable = (pp * 0 == 0) & (pp > 0)
    goal = radius
    if BRAKE & FLAGS:
        goal = tl.where(size > radius, radius + s[GROWTH] * (size - radius), size)
        radius = tl.where(known & usable, goal, radius)
    factor = tl.where(tl.abs(goal / size - 1.0) <= s[TOLERANCE], 1.0, goal / size)
    lost = ~known & (x[0] * 0 == 0)
    factor = tl.where(known & usable, factor, tl.where(lost, 0.0, float("nan")))
    zero = factor * 0
    shift = tl.where(lost, 0.0, -factor * mean)
    return (factor, shift, zero, zero, zero, zero), known & usable, radius, second


@triton.jit
def plan_of(table, factors, counts, number, k, x, FLAGS: tl.constexpr):
    """Coefficients of ``k``, NaN first where a vector stays; updates what the vectors own."""
    zero = tl.zeros_like(x[0])
    s = [zero + tl.load(factors + i) for i in (0, 1, 2, 3, 4)]
    a = [zero + y for y in factors_of(factors, number)]
    n = zero + tl.load(table + number * COLUMNS + LENGTH).to(tl.float64)
    real = k < tl.load(table + number * COLUMNS + VECTORS)
    radii, seconds = _own(table, number, RADIUS) + k, _own(table, number, SECOND) + k
    radius = tl.load(radii, mask=real, other=1.0).to(tl.float64)
    second = radius
    if PER_VECTOR & FLAGS:
        second = tl.load(seconds, mask=real, other=0.0).to(tl.float64)
    if RESTORE & FLAGS:
        c, fine, radius, second = _plan_restore(s, n, x, radius, second, FLAGS)
        refused = fine & ~fine
        first = c[0]
    elif DIAGONAL & FLAGS:
        c, fine, refused, radius, second = _plan_diagonal(s, a, n, x, radius, second, FLAGS)
        first = tl.where(fine, c[0], float("nan"))
    else:
        c, fine, refused, radius, second = _plan_linear(s, a, n, x, radius, second, FLAGS)
        first = tl.where(fine, c[0], float("nan"))
    tl.debug_barrier()  # every warp has read what one of them now writes
    tl.store(radii, radius.to(tl.float32), mask=real)
    if PER_VECTOR & FLAGS:
        tl.store(seconds, second.to(tl.float32), mask=real)
    left = tl.sum((real & (~fine | refused)).to(tl.int64), 0)
    tl.atomic_add(counts + tl.load(table + number * COLUMNS + INDEX), left, mask=left > 0)
    return first, c[1], c[2], c[3], c[4], c[5]
