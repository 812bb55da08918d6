/* Steps on spheres for the CPU, behind a plain C interface: no Python, no torch.
 *
 * The mathematics is that of onsphere/optim/updates/geodesic.py, which the tests compare with this file:
 * `reduce` sums inner products over each vector, `plan` turns them into a few coefficients, `apply`
 * writes the new point as a linear combination. A vector that fits in the cache goes through all
 * three before the next one is read, so that memory is passed once. A larger vector is cut into
 * chunks that threads take one by one: twice through memory, in reverse order the second time, so
 * that what the cache still holds is used first. Chunks and the order in which they are added depend
 * on the shape alone: a result does not change with the number of threads.
 */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

enum { ABI = 6, PADDED = 16, FLUSH = 1024, BLOCK = 512, NUMBERS = 6, COEFFICIENTS = 6 };
enum { FLOAT32, BFLOAT16 };
enum { LINEAR, DIAGONAL, RESTORE };
enum { STEP, REDUCE, APPLY };
/* HARD and ROTATE make the step of another optimizer, whose moments are its own affair. */
enum { RATE, ROTATION, RELATIVE, HARD, ROTATE };
/* Entries that a thread takes at a time, and those for which another thread is worth its start. */
enum { TASK = 1 << 18, SHARE = 1 << 15, KEPT = 1 << 16, LARGE = 1 << 17, CHUNK = 1 << 17, EVEN = 8, WIDE = 1 << 18 };
/* TOGETHER vectors of SHORT entries stay in the first level of the cache from sums to writing, and
 * so does one of NEAR entries. Memory is asked for AHEAD entries before it is read. */
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
    void (*finish)(int64_t, float *, const float *, const float *, const float *, const float *);
    void (*retreat)(int64_t, const float *, float *, float *, const float *);
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

#include "vectors.h"
#include "rows.h"

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

#include "large.h"

/* Entries that a step may keep of a tensor's vectors at a time; loops write a little beyond. */
static int64_t remembered(const Settings *s, const Tensor *t) {
    if (s->kind != DIAGONAL) return PADDED;
    const int64_t across = mixed(t) ? pieces(width(t) * t->inner, PADDED) * PADDED : t->inner;
    const int64_t most_at_once = least(KEPT, most(TOGETHER * SHORT, t->outer * across));
    return pieces(most_at_once, PADDED) * PADDED + 2 * PADDED;
}

/* Returns 0, or 1 when there was no memory and nothing was touched. */
static int run(Tensor *tensors, int64_t count, const Settings *s, int64_t phase) {
    int64_t total = 0, chunks, entries = 0, kept = PADDED;
    int64_t *first = malloc((count + 1) * sizeof *first);
    if (!first) return 1;
    for (int64_t i = 0; i < count; i++) {
        Tensor *t = tensors + i;
        t->skipped = t->unsure = 0;
        first[i] = total, total += tasks(t);
        entries += t->batches * t->vectors * length(t);
        kept = most(kept, remembered(s, t));
    }
    first[count] = total;
    const int64_t vectors = list_large(s, tensors, count, phase, NULL, NULL, &chunks);
    /* Waiting for another thread costs more than a short task. */
    const int threads = (int)most(1, least(s->threads, pieces(entries, SHARE)));
    float *scratch = aligned_alloc(4 * PADDED, threads * kept * sizeof *scratch);
    double *partial = malloc(most(1, chunks) * NUMBERS * sizeof *partial);
    Vector *large_ones = malloc(most(1, vectors) * sizeof *large_ones);
    if (!scratch || !partial || !large_ones) {
        free(first), free(scratch), free(partial), free(large_ones);
        return 1;
    }
    list_large(s, tensors, count, phase, large_ones, partial, &chunks);
    const Worker planner = {s, loops_for(s->sets), scratch};
    for (int64_t i = 0; i < vectors && phase == APPLY; i++)
        add_up_and_plan(&planner, large_ones + i, phase);
#pragma omp parallel num_threads(threads)
    {
        int me = 0, all = 1;
#ifdef _OPENMP
        me = omp_get_thread_num(), all = omp_get_num_threads();
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
        run_large(&w, large_ones, vectors, me, all, phase);
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
