/* Steps on spheres for the CPU, behind a plain C interface: no Python, no torch.
 *
 * The mathematics is that of onsphere/optim/motion.py, which the tests compare with this file:
 * `reduce` sums inner products over each vector, `plan` turns them into a few coefficients, `apply`
 * writes the new point as a linear combination. A vector that fits in the cache goes through all
 * three before the next one is read, so that memory is passed once. A larger vector is cut into
 * chunks that all threads share: twice through memory, in reverse order the second time, so that
 * what the cache still holds is used first. Chunks and the order in which they are added depend on
 * the shape alone: a result does not change with the number of threads.
 */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

enum { ABI = 5, PADDED = 16, FLUSH = 1024, BLOCK = 512, NUMBERS = 6, COEFFICIENTS = 6 };
enum { FLOAT32, BFLOAT16 };
enum { LINEAR, DIAGONAL, RESTORE };
enum { STEP, REDUCE, APPLY };
enum { RATE, ROTATION, RELATIVE };
enum { TASK = 1 << 15, KEPT = 1 << 16, LARGE = 1 << 17, CHUNK = 1 << 15 };
enum { NARROW = 64, STREAMS = 8 };

/* One row of entries that belong to different vectors. */
typedef struct {
    long n;
    int kind, moving;
    float *p;
    const float *g;
    float *m, *v;
    const float *a;
    float *kept;
    long ahead; /* entries to the next row */
} Rows;

typedef struct {
    void (*gram)(long, const float *, const float *, const float *, double *, long);
    void (*mix)(long, float *, const float *, float *, const float *, long);
    void (*blend)(long, float *, const float *, const float *);
    void (*moments)(long, const float *, const float *, const float *, const float *,
                    const float *, float *, double *, long);
    void (*drift)(long, float *, const float *, float *, float *, const float *, const float *,
                  const float *, long);
    void (*size)(long, const float *, double *, long);
    void (*sizes)(long, const float *, double *);
    void (*scale)(long, float *, const float *);
    void (*add)(const Rows *, float *);
    void (*follow)(const Rows *, const float *);
    void (*widen)(long, const uint16_t *, float *);
    void (*narrow)(long, const float *, uint16_t *);
} Loops;

#define NAME(x) x##_plain
#define LANES 4
#define TARGET
#include "loops.h"
#undef NAME
#undef TARGET
#undef LANES
#if (defined(__x86_64__) || defined(_M_X64)) && defined(__GNUC__)
#define MANY_SETS 1
#include <immintrin.h>
#define NAME(x) x##_avx2
#define LANES 8
#define TARGET __attribute__((target("avx2,fma")))
#include "loops.h"
#undef NAME
#undef TARGET
#undef LANES
#define NAME(x) x##_avx512
#define LANES 16
#ifdef __clang__
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"), min_vector_width(512)))
#else
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")))
#endif
#include "loops.h"
#undef NAME
#undef TARGET
#undef LANES
#endif

/* Mirrored by `_Tensor` in __init__.py. Entry (b, o, k, i) of a dense array of shape
 * (batches, outer, vectors, inner) belongs to vector (b, k). */
typedef struct {
    void *point, *slope, *momentum, *square;
    float *radius, *second;
    double *numbers;
    int64_t batches, outer, vectors, inner;
    double a[8];
    int64_t skipped;
} Tensor;

/* Mirrored by `_Settings` in __init__.py. */
typedef struct {
    double rate, radius, growth, tolerance, floor;
    int64_t kind, dtype, lr_is, exponential, brake, centered, ascend, sets, threads;
} Settings;

static const Loops *loops_for(int64_t sets) {
#ifdef MANY_SETS
    __builtin_cpu_init();
    if (sets >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return &loops_avx512;
    if (sets >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return &loops_avx2;
#endif
    (void)sets;
    return &loops_plain;
}

/* ---- plan: numbers per vector in, coefficients out; motion.py has the same in torch ---- */

typedef struct {
    double a, b, d, e; /* p' = a p + b t and m' = m + d p + e t, for a tangent t */
} Move;

/* What motion.Limits says of float32: below LEAST squares have lost digits. */
static const double STEEP = 0.3, LEAST = FLT_MIN / FLT_EPSILON, ENOUGH = 0.1, SMALL_TURN = 1e-4;

/* `whole` is |u|^2 before the projection, `least` what it has to be, `share` that of news, and
 * `relative` what a relative rate is multiplied by. Short vectors spend most of their time here, so
 * that roots and quotients are few. */
static Move motion(const Settings *s, double pp, double tt, double ht, double whole, double radius,
                   double share, double least, double relative) {
    const double rate = s->rate, onto = radius / sqrt(pp);
    const int rotation = s->lr_is == ROTATION;
    Move move = {onto, 0, 0, 0};
    double over, square; /* angle / size and its square times |t|^2 */
    if (rotation) {
        over = rate * fmin(share / ENOUGH, 1) / sqrt(tt);
    } else {
        over = rate * (s->lr_is == RELATIVE ? relative : 1 / radius);
        if (!(whole > least) && !(over * sqrt(least) < SMALL_TURN)) return move;
    }
    square = over * over * tt;
    if (!(square > 0) || !(tt * (1 + square) > STEEP * square * whole)) return move;
    if (rotation && !(whole > least && tt > s->floor * whole)) return move;
    double cosine, sine; /* sine is sin(angle) / size */
    if (rotation || s->exponential) {
        const double angle = over * sqrt(tt);
        cosine = cos(angle), sine = sin(angle) / angle * over;
        if (s->exponential) {
            const double half = sin(angle / 2) / angle * over;
            move.d = ht * sine * onto / radius, move.e = -2 * half * half * ht;
        }
    } else {
        cosine = 1 / sqrt(1 + square), sine = cosine * over;
    }
    move.a = cosine * onto, move.b = -sine * radius;
    if (!s->exponential) {
        const double along = sine * ht / radius;
        move.d = along * move.a, move.e = along * move.b;
    }
    return move;
}

static int sound(const double *x, int count, double least) {
    double sum = 0;
    for (int i = 0; i < count; i++) sum += x[i] * 0;
    return sum == 0 && x[0] > least;
}

/* Which only a rotation asks for. */
static double share_of_news(const Settings *s, double fresh, double momentum, double decay) {
    return s->lr_is == ROTATION && momentum > 0 ? sqrt(fresh / momentum) / fmax(1 - decay, 1e-6) : 1;
}

/* What a plan returns: a vector that cannot follow it, one that does, and one that follows it but
 * does not turn though a gradient asked for that. */
enum { STAYS, MOVES, REFUSED };

static int verdict(const Settings *s, double n, double gg, double tt, double whole, double least,
                   Move move) {
    const int asked = tt > s->floor * whole || (s->lr_is == ROTATION && whole <= least);
    return asked && gg > 0 && move.b == 0 && n > 1 && s->rate > 0 ? REFUSED : MOVES;
}

/* What one vector owns beside its entries. */
typedef struct {
    float radius, second;
} Own;

static Own own(const Tensor *t, int64_t k) {
    return (Own){t->radius ? t->radius[k] : 0, t->second ? t->second[k] : 0};
}

static void keep(const Tensor *t, int64_t k, Own x) {
    if (t->radius) t->radius[k] = x.radius;
    if (t->second) t->second[k] = x.second;
}

static double radius_of(const Settings *s, Own *x, double pp) {
    if (x->radius == 0) x->radius = (float)(s->radius > 0 ? s->radius : sqrt(pp));
    return x->radius;
}

/* Vectors that do not turn and are on their sphere to rounding are left alone, to the bit. */
static void settle(const Settings *s, double n, Move *move, double length, double radius) {
    if (n == 1) *move = (Move){radius / length, 0, 0, 0};
    if (move->b == 0 && fabs(move->a - 1) <= s->tolerance) move->a = 1;
}

static int plan_linear(const Settings *s, const Tensor *t, double n, const double *x, Own *own,
                       float *c) {
    const double least = n * LEAST;
    if (!sound(x, 6, least)) return STAYS;
    const double sign = s->ascend ? -1 : 1, alpha = t->a[0], kappa = t->a[1];
    const double pp = x[0], pg = sign * x[1], pm = x[2];
    const double over = 1 / pp, gamma = pg * over, mu = pm * over;
    const double gg = fmax(x[3] - pg * gamma, 0), gm = sign * x[4] - pg * mu;
    const double mm = fmax(x[5] - pm * mu, 0), radius = radius_of(s, own, pp);
    double u = t->a[2], w = t->a[3]; /* the update is u g + w m, both tangent */
    if (t->second) {
        own->second = (float)(t->a[4] * own->second + (1 - t->a[4]) * gg / n);
        const double moment = fmax(own->second, FLT_MIN);
        const double scale = 1 / (t->a[5] * sqrt(moment) + t->a[6]);
        u *= scale, w *= scale;
    }
    const double tt = fmax(u * u * gg + 2 * u * w * gm + w * w * mm, 0);
    const double raw = u * u * x[3] + 2 * u * w * sign * x[4] + w * w * x[5];
    const double ht = u * kappa * gg + (u * alpha + w * kappa) * gm + w * alpha * mm;
    const double momentum = kappa * kappa * gg + 2 * kappa * alpha * gm + alpha * alpha * mm;
    const double share = share_of_news(s, kappa * kappa * gg, momentum, alpha);
    const double floor = least * (u * u + w * w);
    const double reference = t->a[7];
    const double relative = t->second ? 1 / reference : radius / (reference * reference);
    Move move = motion(s, pp, tt, ht, raw, radius, share, floor, relative);
    settle(s, n, &move, sqrt(pp), radius);
    const double kg = kappa + move.e * u, km = alpha + move.e * w;
    const double all[6] = {move.a - move.b * (u * gamma + w * mu), sign * move.b * u, move.b * w,
                           move.d - kg * gamma - km * mu,          sign * kg,         km};
    for (int i = 0; i < 6; i++) c[i] = (float)all[i];
    return verdict(s, n, x[3], tt, raw, floor, move);
}

static int plan_diagonal(const Settings *s, const Tensor *t, double n, const double *x, Own *own,
                         float *c) {
    const double least = n * LEAST;
    if (!sound(x, 5, least)) return STAYS;
    const double pp = x[0], pu = x[1], uu = x[2], radius = radius_of(s, own, pp);
    const double rho = pu / pp, tt = fmax(uu - pu * rho, 0);
    const double share = share_of_news(s, x[4], uu, t->a[0]);
    Move move = motion(s, pp, tt, 0, uu, radius, share, least, 1 / t->a[7]);
    settle(s, n, &move, sqrt(pp), radius);
    c[0] = (float)(move.a - move.b * rho), c[1] = (float)move.b;
    c[2] = c[3] = c[4] = c[5] = 0;
    return verdict(s, n, x[3], tt, uu, least, move);
}

static int plan_restore(const Settings *s, double n, const double *x, Own *own, float *c) {
    const double mean = s->centered ? x[1] / n : 0, pp = x[0] - n * mean * mean;
    const double size = sqrt(pp), radius = own->radius;
    if (radius == 0 && isfinite(x[0])) { /* it had no direction before the step: back to zero */
        c[0] = c[1] = 0;
        return 0;
    }
    if (!isfinite(pp) || !(pp > 0)) {
        c[0] = 1, c[1] = 0;
        return 0;
    }
    double goal = radius;
    if (s->brake) {
        goal = size > radius ? radius + s->growth * (size - radius) : size;
        own->radius = (float)goal;
    }
    const double factor = fabs(goal / size - 1) <= s->tolerance ? 1 : goal / size;
    c[0] = (float)factor, c[1] = (float)(-factor * mean);
    return 1;
}

static int plan(const Settings *s, const Tensor *t, double n, const double *x, Own *own,
                float *c) {
    if (s->kind == RESTORE) return plan_restore(s, n, x, own, c);
    return s->kind == LINEAR ? plan_linear(s, t, n, x, own, c) : plan_diagonal(s, t, n, x, own, c);
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t pieces(int64_t whole, int64_t part) { return (whole + part - 1) / part; }
static int64_t length(const Tensor *t) { return t->outer * t->inner; }

/* ---- reduce and apply: one contiguous range of entries, block by block ---- */

typedef struct {
    const Settings *s;
    const Loops *loops;
    float *kept; /* this thread's scratch */
} Worker;

static const float zeros[BLOCK];

/* Whether the loops can work on these entries in place. */
static int in_place(const Worker *w, int64_t n) {
    return w->s->dtype == FLOAT32 && n % PADDED == 0;
}

/* How many of `left` entries the loops take next. */
static int64_t stretch(const Worker *w, const Tensor *t, int64_t left) {
    if (!in_place(w, 0) || !(t->momentum || w->s->kind == RESTORE)) return least(left, BLOCK);
    return left < PADDED ? left : left / PADDED * PADDED;
}

/* The entries themselves, or a copy padded with `pad` to a multiple of PADDED. */
static float *fetch(const Worker *w, void *array, int64_t at, int64_t n, float *buffer, float pad) {
    if (!array) return (float *)zeros;
    if (in_place(w, n)) return (float *)array + at;
    if (w->s->dtype == FLOAT32) {
        memcpy(buffer, (float *)array + at, n * sizeof *buffer);
    } else {
        w->loops->widen(n, (uint16_t *)array + at, buffer);
    }
    for (int64_t i = n; i % PADDED; i++) buffer[i] = pad;
    return buffer;
}

static void stow(const Worker *w, void *array, int64_t at, int64_t n, const float *buffer) {
    if (in_place(w, n)) return;
    if (w->s->dtype == FLOAT32) {
        memcpy((float *)array + at, buffer, n * sizeof *buffer);
    } else {
        w->loops->narrow(n, buffer, (uint16_t *)array + at);
    }
}

static void factors(const Tensor *t, float *a) {
    for (int i = 0; i < 8; i++) a[i] = (float)t->a[i];
}

/* How far ahead memory is asked for: the next vector, or a little further in a long one. */
static long next_at(int64_t n) { return n < CHUNK / 2 ? n : FLUSH; }

static void reduce(const Worker *w, const Tensor *t, int64_t at, int64_t n, float *kept,
                   double *sums) {
    float p[BLOCK], g[BLOCK], m[BLOCK], v[BLOCK], a[8];
    const long ahead = next_at(n);
    factors(t, a);
    for (int64_t done = 0, size; done < n; done += size) {
        size = stretch(w, t, n - done);
        const int64_t padded = pieces(size, PADDED) * PADDED;
        const float *point = fetch(w, t->point, at + done, size, p, 0);
        if (w->s->kind == RESTORE) {
            if (size < CHUNK / 2)
                w->loops->size(padded, point, sums, ahead);
            else
                w->loops->sizes(padded, point, sums);
            continue;
        }
        const float *slope = fetch(w, t->slope, at + done, size, g, 0);
        const float *momentum = fetch(w, t->momentum, at + done, size, m, 0);
        if (w->s->kind == LINEAR) {
            w->loops->gram(padded, point, slope, momentum, sums, ahead);
        } else {
            const float *moment = fetch(w, t->square, at + done, size, v, 1);
            w->loops->moments(padded, point, slope, momentum, moment, a, kept ? kept + done : NULL,
                              sums, ahead);
        }
    }
}

static void apply(const Worker *w, const Tensor *t, int64_t at, int64_t n, const float *kept,
                  const float *c) {
    const long ahead = next_at(n);
    float p[BLOCK], g[BLOCK], m[BLOCK], v[BLOCK], a[8];
    factors(t, a);
    for (int64_t done = 0, size; done < n; done += size) {
        size = stretch(w, t, n - done);
        const int64_t padded = pieces(size, PADDED) * PADDED;
        float *point = fetch(w, t->point, at + done, size, p, 0);
        if (w->s->kind == RESTORE) {
            w->loops->scale(padded, point, c);
            stow(w, t->point, at + done, size, point);
            continue;
        }
        const float *slope = fetch(w, t->slope, at + done, size, g, 0);
        if (!t->momentum) {
            w->loops->blend(padded, point, slope, c);
            stow(w, t->point, at + done, size, point);
            continue;
        }
        float *momentum = fetch(w, t->momentum, at + done, size, m, 0);
        if (w->s->kind == LINEAR) {
            w->loops->mix(padded, point, slope, momentum, c, ahead);
        } else {
            float *moment = fetch(w, t->square, at + done, size, v, 1);
            w->loops->drift(padded, point, slope, momentum, moment, a, kept ? kept + done : NULL, c,
                            ahead);
            stow(w, t->square, at + done, size, moment);
        }
        stow(w, t->point, at + done, size, point);
        stow(w, t->momentum, at + done, size, momentum);
    }
}

static int planned(const Worker *w, const Tensor *t, int64_t k, int64_t n, const double *sums,
                   float *c, int64_t phase) {
    if (phase == STEP) {
        Own mine = own(t, k);
        const int fine = plan(w->s, t, (double)n, sums, &mine, c);
        keep(t, k, mine);
        return fine;
    }
    const double *given = t->numbers + k * COEFFICIENTS;
    for (int i = 0; i < COEFFICIENTS; i++) c[i] = (float)given[i];
    return !isnan(given[0]);
}

/* Whether a vector is written: one that was zero before a step goes back to zero. */
static int written(const Worker *w, int fine, const float *c) {
    return fine || (w->s->kind == RESTORE && c[0] == 0);
}

/* Vector number k: `outer` runs of `inner` entries from `at` on. */
static int64_t turn(const Worker *w, const Tensor *t, int64_t k, int64_t at, int64_t phase) {
    const int64_t n = length(t), next = t->vectors * t->inner;
    double sums[NUMBERS] = {0};
    float c[COEFFICIENTS];
    float *kept = phase == STEP && n <= KEPT ? w->kept : NULL;
    for (int64_t o = 0; o < t->outer && phase != APPLY; o++)
        reduce(w, t, at + o * next, t->inner, kept ? kept + o * t->inner : NULL, sums);
    if (phase == REDUCE) {
        memcpy(t->numbers + k * NUMBERS, sums, sizeof sums);
        return 0;
    }
    const int fine = planned(w, t, k, n, sums, c, phase);
    for (int64_t o = 0; o < t->outer && written(w, fine, c); o++)
        apply(w, t, at + o * next, t->inner, kept ? kept + o * t->inner : NULL, c);
    return fine != MOVES;
}

/* ---- neighbours: vectors whose entries alternate in memory, row by row ---- */

typedef struct {
    float p[BLOCK], g[BLOCK], m[BLOCK], v[BLOCK];
} Buffers;

static Rows rows_at(const Worker *w, const Tensor *t, int64_t at, int64_t n, const float *a,
                    float *kept, Buffers *b) {
    return (Rows){pieces(n, PADDED) * PADDED,
                  (int)w->s->kind,
                  t->momentum != NULL,
                  fetch(w, t->point, at, n, b->p, 0),
                  fetch(w, t->slope, at, n, b->g, 0),
                  fetch(w, t->momentum, at, n, b->m, 0),
                  fetch(w, t->square, at, n, b->v, 1),
                  a,
                  kept,
                  t->vectors * t->inner};
}

static void stow_rows(const Worker *w, const Tensor *t, int64_t at, int64_t n, const Rows *r) {
    stow(w, t->point, at, n, r->p);
    if (t->momentum) stow(w, t->momentum, at, n, r->m);
    if (t->square) stow(w, t->square, at, n, r->v);
}

static void add_rows(const Worker *w, const Tensor *t, int64_t at, int64_t across, float *kept,
                     double *sums) {
    static const int flush = 64;
    const int64_t each = pieces(across, PADDED) * PADDED;
    float part[NUMBERS * BLOCK] = {0}, a[8];
    Buffers buffers;
    factors(t, a);
    for (int64_t o = 0; o < t->outer; o++) {
        const Rows r = rows_at(w, t, at + o * t->vectors * t->inner, across, a,
                               kept ? kept + o * each : NULL, &buffers);
        w->loops->add(&r, part);
        if ((o + 1) % flush && o + 1 < t->outer) continue;
        for (int j = 0; j < NUMBERS; j++)
            for (int64_t i = 0; i < across; i++)
                sums[j * BLOCK + i] += part[j * BLOCK + i], part[j * BLOCK + i] = 0;
    }
}

/* `still` marks the entries that stay as they are, to the bit; NULL where all move. */
static void follow_rows(const Worker *w, const Tensor *t, int64_t at, int64_t across, float *kept,
                        const float *c, const char *still) {
    const int64_t each = pieces(across, PADDED) * PADDED;
    float a[8];
    Buffers buffers, before;
    factors(t, a);
    for (int64_t o = 0; o < t->outer; o++) {
        Rows r = rows_at(w, t, at + o * t->vectors * t->inner, across, a,
                         kept ? kept + o * each : NULL, &buffers);
        float *const now[3] = {r.p, t->momentum ? r.m : NULL, t->square ? r.v : NULL};
        float *const then[3] = {before.p, before.m, before.v};
        for (int x = 0; x < 3 && still; x++)
            if (now[x]) memcpy(then[x], now[x], across * sizeof *now[x]);
        w->loops->follow(&r, c);
        for (int x = 0; x < 3 && still; x++)
            for (int64_t i = 0; i < across && now[x]; i++)
                if (still[i]) now[x][i] = then[x][i];
        stow_rows(w, t, at + o * t->vectors * t->inner, across, &r);
    }
}

/* `count` vectors from number `first` of a batch on, together. */
static int64_t turn_rows(const Worker *w, const Tensor *t, int64_t batch, int64_t first,
                         int64_t count, int64_t phase) {
    const int64_t n = length(t), across = count * t->inner;
    const int64_t at = batch * n * t->vectors + first * t->inner;
    const int64_t number = batch * t->vectors + first;
    const int keeps = phase == STEP && t->outer * pieces(across, PADDED) * PADDED <= KEPT;
    double sums[NUMBERS * BLOCK] = {0};
    float c[COEFFICIENTS * BLOCK] = {0};
    char still[BLOCK] = {0};
    int64_t skipped = 0, kept = 0;
    if (phase != APPLY) add_rows(w, t, at, across, keeps ? w->kept : NULL, sums);
    for (int64_t k = 0; k < count; k++) {
        double mine[NUMBERS] = {0};
        float own_c[COEFFICIENTS];
        for (int j = 0; j < NUMBERS; j++)
            for (int64_t i = 0; i < t->inner; i++) mine[j] += sums[j * BLOCK + k * t->inner + i];
        if (phase == REDUCE) {
            memcpy(t->numbers + (number + k) * NUMBERS, mine, sizeof mine);
            continue;
        }
        const int fine = planned(w, t, number + k, n, mine, own_c, phase);
        skipped += fine != MOVES, kept += !written(w, fine, own_c);
        for (int64_t i = k * t->inner; i < (k + 1) * t->inner; i++) {
            still[i] = !written(w, fine, own_c);
            for (int j = 0; j < COEFFICIENTS; j++) c[j * BLOCK + i] = own_c[j];
        }
    }
    if (phase != REDUCE)
        follow_rows(w, t, at, across, keeps ? w->kept : NULL, c, kept ? still : NULL);
    return skipped;
}

/* ---- tasks: ranges of vectors that one thread takes at a time ---- */

static int large(const Tensor *t) { return t->outer == 1 && t->inner > LARGE; }

/* Whether neighbours in memory belong to different vectors so often that they go together. */
static int mixed(const Tensor *t) { return t->outer > 1 && t->inner < NARROW; }

/* Vectors per task. */
static int64_t width(const Tensor *t) {
    if (!mixed(t)) return most(1, TASK / most(1, length(t)));
    return least(t->vectors, BLOCK / t->inner); /* long runs: memory is read row by row */
}

static int64_t tasks(const Tensor *t) {
    if (large(t) || !t->batches || !t->vectors || !length(t)) return 0;
    if (!mixed(t)) return pieces(t->batches * t->vectors, width(t));
    return t->batches * pieces(t->vectors, width(t));
}

static int64_t run_task(const Worker *w, Tensor *t, int64_t task, int64_t phase) {
    const int64_t together = width(t), n = length(t);
    if (mixed(t)) {
        const int64_t across = pieces(t->vectors, together), first = task % across * together;
        return turn_rows(w, t, task / across, first, least(together, t->vectors - first), phase);
    }
    int64_t skipped = 0;
    const int64_t last = least(t->batches * t->vectors, (task + 1) * together);
    for (int64_t k = task * together; k < last; k++) {
        const int64_t batch = k / t->vectors * t->vectors;
        skipped += turn(w, t, k, batch * n + (k - batch) * t->inner, phase);
    }
    return skipped;
}

/* One vector of many chunks, by all threads of the team. `partial` is shared. */
static void turn_large(const Worker *w, Tensor *t, int64_t k, double *partial, int64_t phase) {
    const int64_t n = length(t), chunks = pieces(n, CHUNK), start = k * n;
    double sums[NUMBERS] = {0};
    float c[COEFFICIENTS];
    Own mine = own(t, k); /* every thread plans alike; one of them writes */
    if (phase != APPLY) {
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < chunks; i++) {
            double *sum = partial + i * NUMBERS;
            memset(sum, 0, NUMBERS * sizeof *sum);
            reduce(w, t, start + i * CHUNK, least(CHUNK, n - i * CHUNK), NULL, sum);
        }
        for (int64_t i = 0; i < chunks; i++)
            for (int j = 0; j < NUMBERS; j++) sums[j] += partial[i * NUMBERS + j];
    }
    int fine = 1;
    if (phase == STEP) fine = plan(w->s, t, (double)n, sums, &mine, c);
    if (phase == APPLY) fine = planned(w, t, k, n, sums, c, phase);
#pragma omp barrier
#pragma omp single nowait
    {
        if (phase == REDUCE) memcpy(t->numbers + k * NUMBERS, sums, sizeof sums);
        if (phase == STEP) {
            keep(t, k, mine);
            t->skipped += fine != MOVES;
        }
    }
    if (phase == REDUCE || !written(w, fine, c)) return;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < chunks; i++) {
        const int64_t at = (chunks - 1 - i) * CHUNK;
        apply(w, t, start + at, least(CHUNK, n - at), NULL, c);
    }
}

/* Returns 0, or 1 when there was no memory and nothing was touched. */
static int run(Tensor *tensors, int64_t count, const Settings *s, int64_t phase) {
    int64_t total = 0, longest = 0, *first = malloc((count + 1) * sizeof *first);
    if (!first) return 1;
    for (int64_t i = 0; i < count; i++) {
        Tensor *t = tensors + i;
        t->skipped = 0;
        first[i] = total, total += tasks(t);
        if (large(t)) longest = most(longest, pieces(length(t), CHUNK));
    }
    first[count] = total;
    int threads = (int)most(1, s->threads);
    float *scratch = aligned_alloc(4 * PADDED, threads * (int64_t)KEPT * sizeof *scratch);
    double *partial = malloc(most(1, longest) * NUMBERS * sizeof *partial);
    if (!scratch || !partial) {
        free(first), free(scratch), free(partial);
        return 1;
    }
#pragma omp parallel num_threads(threads)
    {
        int me = 0;
#ifdef _OPENMP
        me = omp_get_thread_num();
#endif
        const Worker w = {s, loops_for(s->sets), scratch + me * (int64_t)KEPT};
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t task = 0; task < total; task++) {
            int64_t low = 0, high = count;
            while (high - low > 1) {
                const int64_t middle = (low + high) / 2;
                *(first[middle] <= task ? &low : &high) = middle;
            }
            const int64_t skipped = run_task(&w, tensors + low, task - first[low], phase);
            if (skipped) {
#pragma omp atomic
                tensors[low].skipped += skipped;
            }
        }
        for (int64_t i = 0; i < count; i++) {
            if (!large(tensors + i)) continue;
            const int64_t vectors = tensors[i].batches * tensors[i].vectors;
            for (int64_t k = 0; k < vectors; k++) turn_large(&w, tensors + i, k, partial, phase);
        }
    }
    free(first), free(scratch), free(partial);
    return 0;
}

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

EXPORT int64_t onsphere_abi(void) { return ABI * 1000000 + sizeof(Tensor) * 1000 + sizeof(Settings); }
EXPORT int onsphere_step(Tensor *t, int64_t count, const Settings *s) { return run(t, count, s, STEP); }
EXPORT int onsphere_reduce(Tensor *t, int64_t count, const Settings *s) { return run(t, count, s, REDUCE); }
EXPORT int onsphere_apply(Tensor *t, int64_t count, const Settings *s) { return run(t, count, s, APPLY); }
/* Adds 1 to counters that are equal; returns what they are then, or -1 with nothing counted. */
EXPORT double onsphere_count(float *const *counters, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (!(*counters[i] == *counters[0])) return -1;
    for (int64_t i = 0; i < count; i++) *counters[i] += 1;
    return count ? *counters[0] : -1;
}
/* 0: without vector instructions, 1: AVX2, 2: AVX-512. */
EXPORT int64_t onsphere_sets(void) {
#ifdef MANY_SETS
    return loops_for(2) == &loops_avx512 ? 2 : loops_for(1) == &loops_avx2 ? 1 : 0;
#else
    return 0;
#endif
}
