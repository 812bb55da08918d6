/* Numbers per vector in, coefficients out; geodesic.py has the same in torch, but for plan_hard.
 *
 * Written without branches: `plans` in loops.h makes TOGETHER of these plans at once, which takes
 * hardly longer than one of them, and short vectors would spend most of their time here. `special` is
 * a constant at every call: whether there may be what is only planned one by one, which is sines and
 * cosines, vectors of a single entry, and a second moment per vector. */

#define FLAT static inline __attribute__((always_inline))

/* Mirrored by `TENSOR` in loader.py. Entry (b, o, k, i) of a dense array of shape
 * (batches, outer, vectors, inner) belongs to vector (b, k). */
typedef struct {
    void *point, *slope, *momentum, *square;
    float *radius, *second;
    double *numbers;
    int64_t batches, outer, vectors, inner;
    double a[8];
    int64_t skipped, unsure;
} Tensor;

/* Mirrored by `SETTINGS` in loader.py. `share` is that of its growth which a vector keeps under the
 * brake, or that of the point which weight decay adds to the gradient. */
typedef struct {
    double rate, radius, share, tolerance, floor;
    int64_t kind, dtype, lr_mode, exponential, brake, centered, ascend, sets, threads;
} Settings;

/* What one vector owns beside its entries: numbers in float. */
typedef struct {
    double radius, second;
} Own;

/* What a plan says: a vector that cannot follow it, one that does, one that follows it but does not
 * turn though a gradient asked for that, and one that does and whose length has to be restored. */
enum { STAYS = 0, MOVES = 1, REFUSED = 2, UNSURE = 3 };

typedef struct {
    double c[COEFFICIENTS];
    Own own;
    double verdict;
} Plan;

typedef struct {
    double a, b, d, e; /* p' = a p + b t and m' = m + d p + e t, for a tangent t */
} Move;

/* What motion.Limits says of float32: below LEAST squares have lost digits. */
static const double STEEP = 0.3, CANCELS = 0.25, LEAST = FLT_MIN / FLT_EPSILON, ENOUGH = 0.1, SMALL_TURN = 1e-4;

FLAT double larger(double x, double y) { return x > y ? x : y; }

/* Truth as a number, 0 or 1: compilers turn selections of doubles into vector code, and seldom what
 * else is decided. A product says "and". */
#define TRUE_IF(condition) ((condition) ? 1.0 : 0.0)
FLAT double finite_number(double x) { return TRUE_IF(x - x == 0); }
FLAT double either(double x, double y) { return larger(x, y); }

FLAT int rotates(const Settings *s, const int special) {
    return special && (s->lr_mode == ROTATION || s->lr_mode == ROTATE);
}

/* `whole` is |u|^2 before the projection, `least` what it has to be, `share` that of news, and
 * `relative` what a relative rate is multiplied by. */
FLAT Move motion(const Settings *s, double pp, double tt, double ht, double whole, double radius,
                 double share, double least, double relative, const int special) {
    const double onto = radius / sqrt(pp);
    const int rotation = rotates(s, special), exponential = special && s->exponential;
    const double factor = s->lr_mode == RELATIVE ? relative : 1 / radius;
    /* angle / size, and its square times |t|^2 */
    const double over =
        s->rate * (rotation ? (share < ENOUGH ? share / ENOUGH : 1) / sqrt(tt) : factor);
    const double square = over * over * tt;
    const double clear = TRUE_IF(whole > least);
    const double enough = rotation ? clear * TRUE_IF(tt > s->floor * whole)
                                   : either(clear, TRUE_IF(over * sqrt(least) < SMALL_TURN));
    const double steep = TRUE_IF(tt * (1 + square) > STEEP * square * whole);
    const double turns = enough * steep * TRUE_IF(square > 0);
    double cosine = 1 / sqrt(1 + square), sine = cosine * over; /* sine is sin(angle) / size */
    double along = sine * ht / radius, d, e;
    if (rotation || exponential) {
        const double angle = over * sqrt(tt);
        cosine = cos(angle), sine = sin(angle) / angle * over, along = sine * ht / radius;
    }
    d = along * cosine * onto, e = along * -sine * radius;
    if (exponential) {
        const double angle = over * sqrt(tt), half = sin(angle / 2) / angle * over;
        d = ht * sine * onto / radius, e = -2 * half * half * ht;
    }
    return (Move){turns > 0 ? cosine * onto : onto, turns > 0 ? -sine * radius : 0,
                  turns > 0 ? d : 0, turns > 0 ? e : 0};
}

/* Which only a rotation asks for. */
FLAT double share_of_news(const Settings *s, double fresh, double momentum, double decay,
                          const int special) {
    const int asked = special && s->lr_mode == ROTATION && momentum > 0;
    return asked ? sqrt(fresh / momentum) / larger(1 - decay, 1e-6) : 1;
}

FLAT double verdict(const Settings *s, double n, double gg, double tt, double whole, double least,
                 double b, const int special) {
    const int rotation = rotates(s, special);
    /* What another optimizer asks for is its update. */
    const double asks = special && s->lr_mode == ROTATE ? whole : gg;
    const double some = n > 1 && s->rate > 0 ? 0 : INFINITY, lost = TRUE_IF(whole <= least);
    const double asked = either(TRUE_IF(tt > s->floor * whole), rotation ? lost : 0);
    return MOVES + (REFUSED - MOVES) * asked * TRUE_IF(asks > some) * TRUE_IF(b == 0);
}

FLAT double radius_of(const Settings *s, Own own, double pp) {
    const double fresh = (float)(s->radius > 0 ? s->radius : sqrt(pp));
    return own.radius == 0 ? fresh : own.radius;
}

/* Vectors that do not turn and are on their sphere to rounding are left alone, to the bit. */
FLAT Move settle(const Settings *s, double n, Move move, double pp, double radius,
                 const int special) {
    if (special && n == 1) move = (Move){radius / sqrt(pp), 0, 0, 0};
    const double rests = TRUE_IF(move.b == 0) * TRUE_IF(fabs(move.a - 1) <= s->tolerance);
    move.a = rests > 0 ? 1 : move.a;
    return move;
}

/* x: <p,p> <p,g> <p,m> <g,g> <g,m> <m,m> */
FLAT Plan plan_linear(const Settings *s, const Tensor *t, double n, const double *x, Own own,
                      const int special) {
    const double least = n * LEAST, sum = x[0] + x[1] + x[2] + x[3] + x[4] + x[5];
    const double sound = finite_number(sum) * TRUE_IF(x[0] > least);
    const double sign = s->ascend ? -1 : 1, alpha = t->a[0], kappa = t->a[1];
    const double pp = x[0], pg = sign * x[1], pm = x[2], raw_gm = sign * x[4];
    const double over = 1 / pp, gamma = pg * over, mu = pm * over;
    const double gg = larger(x[3] - pg * gamma, 0), gm = raw_gm - pg * mu;
    const double mm = larger(x[5] - pm * mu, 0), radius = radius_of(s, own, pp);
    const double second = (float)(t->a[4] * own.second + (1 - t->a[4]) * gg / n);
    const int normed = special && t->second;
    const double scale = normed ? 1 / (t->a[5] * sqrt(larger(second, FLT_MIN)) + t->a[6]) : 1;
    const double u = scale * t->a[2], w = scale * t->a[3]; /* the update is u g + w m */
    const double tt = larger(u * u * gg + 2 * u * w * gm + w * w * mm, 0);
    const double raw = u * u * x[3] + 2 * u * w * raw_gm + w * w * x[5];
    const double ht = u * kappa * gg + (u * alpha + w * kappa) * gm + w * alpha * mm;
    const double momentum = kappa * kappa * gg + 2 * kappa * alpha * gm + alpha * alpha * mm;
    const double share = share_of_news(s, kappa * kappa * gg, momentum, alpha, special);
    const double floor = least * (u * u + w * w), reference = t->a[7];
    const double relative = normed ? 1 / reference : radius / (reference * reference);
    const Move turned = motion(s, pp, tt, ht, raw, radius, share, floor, relative, special);
    const Move move = settle(s, n, turned, pp, radius, special);
    const int free = special && s->lr_mode == ROTATE; /* momentum is not projected */
    const double kg = free ? kappa : kappa + move.e * u, km = free ? alpha : alpha + move.e * w;
    const double kp = free ? 0 : move.d - kg * gamma - km * mu;
    const double fine = verdict(s, n, x[3], tt, raw, floor, move.b, special);
    /* Where gradient and momentum cancel, what is left is not known well enough for the length. */
    const double parts = u * u * x[3] + w * w * x[5], steep = s->rate < 1 ? s->rate * s->rate : 1;
    const int unsure = free && move.b != 0 && tt < STEEP * steep * parts;
    return (Plan){{move.a - move.b * (u * gamma + w * mu), sign * move.b * u, move.b * w,
                   kp, sign * kg, km},
                  {sound > 0 ? radius : own.radius, normed && sound > 0 ? second : own.second},
                  sound * (unsure ? UNSURE : fine)};
}

/* Whether a vector and its gradient can be told to have a direction; which another optimizer does
 * not ask for. */
static int has_direction(const Settings *s, int64_t n, double pp, double gg) {
    return finite_number(pp + gg) > 0 && (s->lr_mode == HARD || pp > (double)n * LEAST);
}

/* x, with u = (b1 m + k1 g) w: <p,p> <p,u> <u,u> <g,g> |k1 g w|^2 */
FLAT Plan plan_diagonal(const Settings *s, const Tensor *t, double n, const double *x, Own own,
                        const int special) {
    const double least = n * LEAST, sum = x[0] + x[1] + x[2] + x[3] + x[4];
    const double sound = finite_number(sum) * TRUE_IF(x[0] > least);
    const double pp = x[0], pu = x[1], uu = x[2], radius = radius_of(s, own, pp);
    const double rho = pu / pp, tt = larger(uu - pu * rho, 0);
    const double share = share_of_news(s, x[4], uu, t->a[0], special);
    const Move turned = motion(s, pp, tt, 0, uu, radius, share, least, 1 / t->a[7], special);
    const Move move = settle(s, n, turned, pp, radius, special);
    const double fine = verdict(s, n, x[3], tt, uu, least, move.b, special);
    return (Plan){{move.a - move.b * rho, move.b, 0, 0, 0, 0},
                  {sound > 0 ? radius : own.radius, own.second},
                  sound * fine};
}

/* x as for the others. The step of another optimizer goes to q = k p + y g + z m, or k p + y u, and the
 * point to r q / |q|. Where the parts of q cancel, x does not say how long it is; it is restored
 * after the step. A vector that is on its sphere and has no update is left alone, to the bit. */
FLAT Plan plan_hard(const Settings *s, const Tensor *t, const double *x, Own own, const int64_t kind) {
    const int linear = kind == LINEAR;
    const double sum = x[0] + x[1] + x[2] + x[3] + x[4] + (linear ? x[5] : 0);
    const double sound = finite_number(sum), sign = linear && s->ascend ? -1 : 1;
    const double along = linear ? t->a[2] : 1;
    const double k = 1 - s->rate * s->share * along;
    const double y = -s->rate * along * sign, z = linear ? -s->rate * t->a[3] : 0;
    const double update = y * y * x[linear ? 3 : 2] + (linear ? z * z * x[5] : 0);
    const double cross = k * y * x[1] + (linear ? k * z * x[2] + y * z * x[4] : 0);
    const double whole = k * k * x[0] + update, square = whole + 2 * cross;
    const double known = TRUE_IF(square > CANCELS * whole);
    const double scale = known > 0 ? own.radius / sqrt(square) : 1;
    const double rests = TRUE_IF(update == 0) * TRUE_IF(fabs(k * scale - 1) <= s->tolerance);
    return (Plan){{rests > 0 ? 1 : k * scale, y * scale, z * scale,
                   linear ? t->a[1] * s->share : 0, linear ? sign * t->a[1] : 0,
                   linear ? t->a[0] : 0},
                  own,
                  sound * (known > 0 ? MOVES : UNSURE)};
}

/* x: <p,p> <1,p>. A vector that had no direction before the step goes back to zero. */
FLAT Plan plan_restore(const Settings *s, double n, const double *x, Own own) {
    const double mean = s->centered ? x[1] / n : 0, pp = x[0] - n * mean * mean;
    const double size = sqrt(pp), radius = own.radius;
    const double zero = TRUE_IF(radius == 0) * finite_number(x[0]);
    const double fine = (1 - zero) * finite_number(pp) * TRUE_IF(pp > 0);
    const double braked = size > radius ? radius + s->share * (size - radius) : size;
    const double goal = s->brake ? braked : radius, ratio = goal / size;
    const double factor = fabs(ratio - 1) <= s->tolerance ? 1 : ratio;
    const double next = s->brake ? (float)goal : radius;
    return (Plan){{fine > 0 ? factor : 1 - zero, fine > 0 ? -factor * mean : 0, 0, 0, 0, 0},
                  {fine > 0 ? next : radius, own.second},
                  fine};
}

FLAT Plan plan(const Settings *s, const Tensor *t, double n, const double *x, Own own,
               const int64_t kind, const int special) {
    if (kind == RESTORE) return plan_restore(s, n, x, own);
    if (s->lr_mode == HARD) return plan_hard(s, t, x, own, kind);
    return kind == LINEAR ? plan_linear(s, t, n, x, own, special)
                          : plan_diagonal(s, t, n, x, own, special);
}

/* Whether plans have nothing special about them. */
static int usual(const Settings *s, const Tensor *t) {
    if (s->kind == RESTORE) return 1;
    return !rotates(s, 1) && !s->exponential && !t->second && t->outer * t->inner > 1;
}
