/* Steps on spheres for the CPU, behind a plain C interface: no Python, no torch.
 *
 * The mathematics is that of onsphere/optim/updates/geodesic.py, which the tests compare with this file:
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
enum { TASK = 1 << 15, KEPT = 1 << 16, LARGE = 1 << 17, CHUNK = 1 << 15, WIDE = 1 << 18 };
/* TOGETHER vectors of SHORT entries stay in the first level of the cache from sums to writing, and so
 * does one of NEAR entries. */
enum { NARROW = 64, STREAMS = 8, TOGETHER = 8, SHORT = 128, NEAR = 1024, AHEAD = 192 };
/* Which of the factors of a diagonal update says whether the share of news is asked for. */
enum { NEWS = 6 };

#include "plan.h"

/* Vectors whose plans are made at once: number j of vector i lies at [j][i]. */
typedef struct {
    double x[NUMBERS][TOGETHER];
    double radius[TOGETHER], second[TOGETHER], c[COEFFICIENTS][TOGETHER], verdict[TOGETHER];
} Group;

/* One row of entries that belong to different vectors. */
typedef struct {
    int64_t n;
    int kind, moving;
    float *p;
    const float *g;
    float *m, *v;
    const float *a;
    float *kept;
    int64_t ahead; /* entries to the next row */
} Rows;

typedef struct {
    void (*gram)(int64_t, const float *, const float *, const float *, double *);
    void (*mix)(int64_t, float *, const float *, float *, const float *);
    void (*blend)(int64_t, float *, const float *, const float *, const float *);
    void (*moments)(int64_t, const float *, const float *, const float *, const float *,
                    const float *, float *, double *);
    void (*look)(int64_t, const float *, const float *, const float *, const float *, double *);
    void (*advance)(int64_t, const float *, const float *, float *, float *, const float *,
                    float *, double *);
    void (*drift)(int64_t, float *, const float *, float *, float *, const float *, const float *,
                  const float *);
    void (*size)(int64_t, const float *, double *);
    void (*sizes)(int64_t, const float *, double *);
    void (*scale)(int64_t, float *, const float *);
    void (*add)(const Rows *, float *);
    void (*follow)(const Rows *, const float *);
    void (*widen)(int64_t, const uint16_t *, float *);
    void (*narrow)(int64_t, const float *, uint16_t *);
    void (*plans)(const Settings *, const Tensor *, double, Group *);
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

static Own own(const Tensor *t, int64_t k) {
    return (Own){t->radius ? t->radius[k] : 0, t->second ? t->second[k] : 0};
}

static void keep(const Tensor *t, int64_t k, Own x) {
    if (t->radius) t->radius[k] = (float)x.radius;
    if (t->second) t->second[k] = (float)x.second;
}

/* One plan: writes coefficients and what the vector owns, returns the verdict. */
static int plan_one(const Settings *s, const Tensor *t, double n, const double *x, Own *own,
                    float *c) {
    const Plan made = plan(s, t, n, x, *own, s->kind, 1);
    *own = made.own;
    for (int i = 0; i < COEFFICIENTS; i++) c[i] = (float)made.c[i];
    return (int)made.verdict;
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
    return left < 4 * PADDED ? left : left / PADDED * PADDED;
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

static void factors(const Worker *w, const Tensor *t, float *a) {
    for (int i = 0; i < 8; i++) a[i] = (float)t->a[i];
    if (w->s->kind == DIAGONAL) a[NEWS] = w->s->lr_mode == ROTATION;
}

static void reduce(const Worker *w, const Tensor *t, const float *a, int64_t at, int64_t n,
                   float *kept, double *sums) {
    float p[BLOCK], g[BLOCK], m[BLOCK], v[BLOCK];
    for (int64_t done = 0, size; done < n; done += size) {
        size = stretch(w, t, n - done);
        const int64_t padded = pieces(size, PADDED) * PADDED;
        const float *point = fetch(w, t->point, at + done, size, p, 0);
        if (w->s->kind == RESTORE) {
            if (size < CHUNK / 2)
                w->loops->size(padded, point, sums);
            else
                w->loops->sizes(padded, point, sums);
            continue;
        }
        const float *slope = fetch(w, t->slope, at + done, size, g, 0);
        const float *momentum = fetch(w, t->momentum, at + done, size, m, 0);
        if (w->s->kind == LINEAR) {
            w->loops->gram(padded, point, slope, momentum, sums);
        } else {
            const float *moment = fetch(w, t->square, at + done, size, v, 1);
            w->loops->moments(padded, point, slope, momentum, moment, a, kept ? kept + done : NULL,
                              sums);
        }
    }
}

/* `next` is how far it is to the vector that is wanted next. */
static void apply(const Worker *w, const Tensor *t, const float *a, int64_t at, int64_t n,
                  const float *kept, const float *c, int64_t next) {
    float p[BLOCK], g[BLOCK], m[BLOCK], v[BLOCK];
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
            w->loops->blend(padded, point, slope, c, slope + next);
            stow(w, t->point, at + done, size, point);
            continue;
        }
        float *momentum = fetch(w, t->momentum, at + done, size, m, 0);
        if (w->s->kind == LINEAR) {
            w->loops->mix(padded, point, slope, momentum, c);
        } else {
            float *moment = fetch(w, t->square, at + done, size, v, 1);
            w->loops->drift(padded, point, slope, momentum, moment, a, kept ? kept + done : NULL, c);
            stow(w, t->square, at + done, size, moment);
        }
        stow(w, t->point, at + done, size, point);
        stow(w, t->momentum, at + done, size, momentum);
    }
}

/* ---- a diagonal update of a vector that stays at hand: point and gradient are looked at first, and
 * where nothing speaks against them, both moments are written while the sums are taken ---- */

/* Whether this is done: the vector has to stay in the first level of the cache. */
static int at_once(const Worker *w, int64_t n, int64_t phase) {
    return w->s->kind == DIAGONAL && phase == STEP && n <= NEAR;
}

static void look(const Worker *w, const Tensor *t, int64_t at, int64_t n, double *sums) {
    float p[BLOCK], g[BLOCK];
    double found[2] = {0};
    for (int64_t done = 0, size; done < n; done += size) {
        size = stretch(w, t, n - done);
        const float *point = fetch(w, t->point, at + done, size, p, 0);
        const float *slope = fetch(w, t->slope, at + done, size, g, 0);
        const float *m = w->s->dtype == FLOAT32 ? (float *)t->momentum + at + done : p;
        const float *v = w->s->dtype == FLOAT32 ? (float *)t->square + at + done : p;
        w->loops->look(pieces(size, PADDED) * PADDED, point, slope, m, v, found);
    }
    sums[0] += found[0], sums[3] += found[1];
}

static void advance(const Worker *w, const Tensor *t, const float *a, int64_t at, int64_t n,
                    float *u, double *sums) {
    float p[BLOCK], g[BLOCK], m[BLOCK], v[BLOCK];
    double found[3] = {0};
    for (int64_t done = 0, size; done < n; done += size) {
        size = stretch(w, t, n - done);
        const float *point = fetch(w, t->point, at + done, size, p, 0);
        const float *slope = fetch(w, t->slope, at + done, size, g, 0);
        float *momentum = fetch(w, t->momentum, at + done, size, m, 0);
        float *moment = fetch(w, t->square, at + done, size, v, 1);
        w->loops->advance(pieces(size, PADDED) * PADDED, point, slope, momentum, moment, a, u + done,
                          found);
        stow(w, t->momentum, at + done, size, momentum);
        stow(w, t->square, at + done, size, moment);
    }
    sums[1] += found[0], sums[2] += found[1], sums[4] += found[2];
}

/* The sums of one vector, all of `outer` runs of `inner` entries, and its moments written. */
static void look_and_advance(const Worker *w, const Tensor *t, const float *a, int64_t at, float *u,
                             double *sums) {
    const int64_t next = t->vectors * t->inner;
    for (int64_t o = 0; o < t->outer; o++) look(w, t, at + o * next, t->inner, sums);
    if (!has_direction(length(t), sums[0], sums[3])) return;
    for (int64_t o = 0; o < t->outer; o++)
        advance(w, t, a, at + o * next, t->inner, u + o * t->inner, sums);
}

/* Writes a point whose update is known. */
static void follow(const Worker *w, const Tensor *t, int64_t at, int64_t n, const float *u,
                   const float *c, int64_t next) {
    float p[BLOCK];
    for (int64_t done = 0, size; done < n; done += size) {
        size = stretch(w, t, n - done);
        float *point = fetch(w, t->point, at + done, size, p, 0);
        const float *slope = w->s->dtype == FLOAT32 ? (float *)t->slope + at + done : p;
        w->loops->blend(pieces(size, PADDED) * PADDED, point, u + done, c, slope + next);
        stow(w, t->point, at + done, size, point);
    }
}

static int planned(const Worker *w, const Tensor *t, int64_t k, int64_t n, const double *sums,
                   float *c, int64_t phase) {
    if (phase == STEP) {
        Own mine = own(t, k);
        const int fine = plan_one(w->s, t, (double)n, sums, &mine, c);
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

/* Writes `inner` entries of a vector; of its moments, unless they were written `once`, as well. */
static void write_run(const Worker *w, const Tensor *t, const float *a, int64_t at,
                      const float *kept, const float *c, int once, int64_t next) {
    if (once)
        follow(w, t, at, t->inner, kept, c, next);
    else
        apply(w, t, a, at, t->inner, kept, c, next);
}

/* Vector number k: `outer` runs of `inner` entries from `at` on. */
static int64_t turn(const Worker *w, const Tensor *t, int64_t k, int64_t at, int64_t phase) {
    const int64_t n = length(t), next = t->vectors * t->inner;
    double sums[NUMBERS] = {0};
    float c[COEFFICIENTS], a[8];
    factors(w, t, a);
    const int once = at_once(w, n, phase);
    float *kept = phase == STEP && n <= KEPT ? w->kept : NULL;
    if (once) look_and_advance(w, t, a, at, kept, sums);
    for (int64_t o = 0; o < t->outer && phase != APPLY && !once; o++)
        reduce(w, t, a, at + o * next, t->inner, kept ? kept + o * t->inner : NULL, sums);
    if (phase == REDUCE) {
        memcpy(t->numbers + k * NUMBERS, sums, sizeof sums);
        return 0;
    }
    const int fine = planned(w, t, k, n, sums, c, phase);
    for (int64_t o = 0; o < t->outer && written(w, fine, c); o++)
        write_run(w, t, a, at + o * next, kept ? kept + o * t->inner : NULL, c, once, t->inner);
    return fine != MOVES;
}

/* TOGETHER short vectors, one after the other in memory, from number k on: their plans are made at
 * once. */
static int64_t turn_together(const Worker *w, const Tensor *t, int64_t k) {
    const int64_t n = t->inner;
    const int once = at_once(w, n, STEP);
    double sums[TOGETHER][NUMBERS] = {{0}};
    Group group;
    float a[8];
    int64_t skipped = 0;
    factors(w, t, a);
    for (int i = 0; i < TOGETHER; i++) {
        if (once)
            look_and_advance(w, t, a, (k + i) * n, w->kept + i * n, sums[i]);
        else
            reduce(w, t, a, (k + i) * n, n, w->kept + i * n, sums[i]);
        const Own mine = own(t, k + i);
        group.radius[i] = mine.radius, group.second[i] = mine.second;
    }
    for (int j = 0; j < NUMBERS; j++)
        for (int i = 0; i < TOGETHER; i++) group.x[j][i] = sums[i][j];
    w->loops->plans(w->s, t, (double)n, &group);
    for (int i = 0; i < TOGETHER; i++) {
        float c[COEFFICIENTS];
        for (int j = 0; j < COEFFICIENTS; j++) c[j] = (float)group.c[j][i];
        keep(t, k + i, (Own){group.radius[i], group.second[i]});
        skipped += group.verdict[i] != MOVES;
        if (written(w, group.verdict[i] != STAYS, c))
            write_run(w, t, a, (k + i) * n, w->kept + i * n, c, once, TOGETHER * n);
    }
    return skipped;
}

/* Whether vectors are planned together. */
static int grouped(const Worker *w, const Tensor *t, int64_t phase) {
    return phase == STEP && t->outer == 1 && t->vectors == 1 && t->inner <= SHORT &&
           usual(w->s, t);
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
    factors(w, t, a);
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
    factors(w, t, a);
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
    int64_t k = task * together;
    for (; grouped(w, t, phase) && k + TOGETHER <= last; k += TOGETHER)
        skipped += turn_together(w, t, k);
    for (; k < last; k++) {
        const int64_t batch = k / t->vectors * t->vectors;
        skipped += turn(w, t, k, batch * n + (k - batch) * t->inner, phase);
    }
    return skipped;
}

/* ---- large vectors: many chunks each, which threads take in turn and no thread waits for more
 * than one of ---- */

/* Entries of a chunk. Those that are only looked at are read at several places at once, far apart. */
static int64_t chunk_of(const Settings *s, int64_t phase) {
    return phase == REDUCE && s->kind == RESTORE ? WIDE : CHUNK;
}

/* One large vector: its tasks are the chunks to sum, and then the chunks to write. */
typedef struct {
    Tensor *tensor;
    int64_t number, chunks, first; /* number of the vector, and of its first task */
    int64_t left;                  /* chunks that are not summed yet */
    int ready, fine;               /* whether coefficients are known */
    float c[COEFFICIENTS];
    double *partial; /* sums of each chunk */
} Vector;

/* Adds up the chunks, and plans. */
static void settle_sums(const Worker *w, Vector *v, int64_t phase) {
    double sums[NUMBERS] = {0};
    Tensor *t = v->tensor;
    for (int64_t i = 0; i < v->chunks && phase != APPLY; i++)
        for (int j = 0; j < NUMBERS; j++) sums[j] += v->partial[i * NUMBERS + j];
    if (phase == REDUCE) {
        memcpy(t->numbers + v->number * NUMBERS, sums, sizeof sums);
        return;
    }
    v->fine = planned(w, t, v->number, length(t), sums, v->c, phase);
    if (v->fine != MOVES) __atomic_add_fetch(&t->skipped, 1, __ATOMIC_RELAXED);
    __atomic_store_n(&v->ready, 1, __ATOMIC_RELEASE);
}

/* Sums one chunk. Who sums the last one plans. */
static void sum_chunk(const Worker *w, Vector *v, int64_t i, int64_t phase) {
    const Tensor *t = v->tensor;
    const int64_t n = length(t), chunk = chunk_of(w->s, phase), from = i * chunk;
    double *sum = v->partial + i * NUMBERS;
    float a[8];
    factors(w, t, a);
    memset(sum, 0, NUMBERS * sizeof *sum);
    reduce(w, t, a, v->number * n + from, least(chunk, n - from), NULL, sum);
    if (!__atomic_sub_fetch(&v->left, 1, __ATOMIC_ACQ_REL)) settle_sums(w, v, phase);
}

/* Writes one chunk, when all are summed: the last one first, which the cache may still hold. */
static void write_chunk(const Worker *w, Vector *v, int64_t i) {
    const Tensor *t = v->tensor;
    const int64_t n = length(t), from = (v->chunks - 1 - i) * CHUNK;
    float a[8];
    factors(w, t, a);
    while (!__atomic_load_n(&v->ready, __ATOMIC_ACQUIRE))
        ;
    if (written(w, v->fine, v->c))
        apply(w, t, a, v->number * n + from, least(CHUNK, n - from), NULL, v->c, AHEAD);
}

static int64_t tasks_in(const Vector *v, int64_t phase) {
    return phase == STEP ? 2 * v->chunks : v->chunks;
}

/* Takes tasks in their order, so that what a chunk waits for has been begun. `next` is shared. */
static void run_large(const Worker *w, Vector *vectors, int64_t count, int64_t *next, int64_t phase) {
    if (!count) return;
    const int64_t total = vectors[count - 1].first + tasks_in(vectors + count - 1, phase);
    Vector *v = vectors;
    for (int64_t task; (task = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < total;) {
        while (task >= v->first + tasks_in(v, phase)) v++;
        const int64_t i = task - v->first;
        if (phase != APPLY && i < v->chunks)
            sum_chunk(w, v, i, phase);
        else
            write_chunk(w, v, phase == STEP ? i - v->chunks : i);
    }
}

/* Lists the large vectors; `vectors` and `partial` may be NULL to count only. Returns their number, and
 * that of their chunks in `chunks`. */
static int64_t list_large(const Settings *s, Tensor *tensors, int64_t count, int64_t phase,
                          Vector *vectors, double *partial, int64_t *chunks) {
    int64_t found = 0, tasks = 0;
    *chunks = 0;
    for (int64_t i = 0; i < count; i++) {
        Tensor *t = tensors + i;
        const int64_t each = large(t) ? pieces(length(t), chunk_of(s, phase)) : 0;
        for (int64_t k = 0; k < t->batches * t->vectors && each; k++, found++, *chunks += each) {
            if (!vectors) continue;
            Vector v = {t, k, each, tasks, each, 0, 0, {0}, partial + *chunks * NUMBERS};
            vectors[found] = v;
            tasks += tasks_in(&v, phase);
        }
    }
    return found;
}

/* Entries that a step may keep of a tensor's vectors at a time; loops write a little beyond. */
static int64_t remembered(const Settings *s, const Tensor *t) {
    if (s->kind != DIAGONAL) return PADDED;
    const int64_t across = mixed(t) ? pieces(width(t) * t->inner, PADDED) * PADDED : t->inner;
    return pieces(least(KEPT, most(TOGETHER * SHORT, t->outer * across)), PADDED) * PADDED + 2 * PADDED;
}

/* Returns 0, or 1 when there was no memory and nothing was touched. */
static int run(Tensor *tensors, int64_t count, const Settings *s, int64_t phase) {
    int64_t total = 0, chunks, entries = 0, kept = PADDED, next = 0;
    int64_t *first = malloc((count + 1) * sizeof *first);
    if (!first) return 1;
    for (int64_t i = 0; i < count; i++) {
        Tensor *t = tensors + i;
        t->skipped = 0;
        first[i] = total, total += tasks(t);
        entries += t->batches * t->vectors * length(t);
        kept = most(kept, remembered(s, t));
    }
    first[count] = total;
    const int64_t vectors = list_large(s, tensors, count, phase, NULL, NULL, &chunks);
    /* Waiting for another thread costs more than a short task. */
    const int threads = (int)most(1, least(s->threads, pieces(entries, TASK)));
    float *scratch = aligned_alloc(4 * PADDED, threads * kept * sizeof *scratch);
    double *partial = malloc(most(1, chunks) * NUMBERS * sizeof *partial);
    Vector *large_ones = malloc(most(1, vectors) * sizeof *large_ones);
    if (!scratch || !partial || !large_ones) {
        free(first), free(scratch), free(partial), free(large_ones);
        return 1;
    }
    list_large(s, tensors, count, phase, large_ones, partial, &chunks);
    const Worker planner = {s, loops_for(s->sets), scratch};
    for (int64_t i = 0; i < vectors && phase == APPLY; i++) settle_sums(&planner, large_ones + i, phase);
#pragma omp parallel num_threads(threads)
    {
        int me = 0;
#ifdef _OPENMP
        me = omp_get_thread_num();
#endif
        const Worker w = {s, planner.loops, scratch + me * kept};
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t task = 0; task < total; task++) {
            int64_t low = 0, high = count;
            while (high - low > 1) {
                const int64_t middle = (low + high) / 2;
                *(first[middle] <= task ? &low : &high) = middle;
            }
            const int64_t skipped = run_task(&w, tensors + low, task - first[low], phase);
            if (skipped) __atomic_add_fetch(&tensors[low].skipped, skipped, __ATOMIC_RELAXED);
        }
        run_large(&w, large_ones, vectors, &next, phase);
    }
    free(first), free(scratch), free(partial), free(large_ones);
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
