/* Large vectors: many chunks each. A thread writes the chunks that it has summed, the last one
 * first: its own cache may still hold them, and that of another core may be far away. Before it
 * writes it waits for what others are summing of this vector, and for nothing else. */

#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
static void let_others_run(void) { sched_yield(); }
#else
static void let_others_run(void) {}
#endif
enum { PATIENCE = 1000 };

/* Entries of a chunk of a vector of n: a few threads get equally many chunks. Those that are only
 * read are read at several places at once, far apart. */
static int64_t chunk_of(const Settings *s, int64_t n, int64_t phase) {
    if (phase == REDUCE && s->kind == RESTORE) return WIDE;
    return pieces(pieces(n, pieces(n, EVEN * CHUNK) * EVEN), PADDED) * PADDED;
}

/* One large vector. */
typedef struct {
    Tensor *tensor;
    int64_t number, chunks;
    int64_t left;                  /* chunks that are not summed yet */
    int ready, fine;               /* whether coefficients are known */
    float c[COEFFICIENTS];
    double *partial; /* sums of each chunk */
} Vector;

/* Adds up the chunks, and plans. */
static void add_up_and_plan(const Worker *w, Vector *v, int64_t phase) {
    double sums[NUMBERS] = {0};
    Tensor *t = v->tensor;
    for (int64_t i = 0; i < v->chunks && phase != APPLY; i++)
        for (int j = 0; j < NUMBERS; j++) sums[j] += v->partial[i * NUMBERS + j];
    if (phase == REDUCE) {
        memcpy(t->numbers + v->number * NUMBERS, sums, sizeof sums);
        return;
    }
    v->fine = planned(w, t, v->number, length(t), sums, v->c, phase);
    if (left(t, v->fine)) __atomic_add_fetch(&t->skipped, 1, __ATOMIC_RELAXED);
    __atomic_store_n(&v->ready, 1, __ATOMIC_RELEASE);
}

/* ---- a diagonal update writes both moments while the sums are taken, as for vectors that stay at
 * hand, and reads one array less when it writes the point. A gradient that is not finite may come
 * late: the vector is refused then, and its moments are brought back, to rounding. ---- */

static int goes_ahead(const Worker *w, const Tensor *t, int64_t phase) {
    const int known = w->s->kind == DIAGONAL && w->s->dtype == FLOAT32;
    return known && phase == STEP && t->a[0] > 0 && t->a[2] > 0;
}

/* Where the sums of a chunk say how many of its moments were written: no plan asks for it. */
enum { AHEAD_BY = 5 };

static void go_ahead(const Worker *w, const Tensor *t, const float *a, int64_t at, int64_t n,
                     double *sums) {
    float u[NEAR + 2 * PADDED];
    int64_t done = 0;
    for (int64_t size; done < n; done += size) {
        double found[NUMBERS] = {0};
        size = least(NEAR, n - done);
        look(w, t, at + done, size, found);
        const int sound = isfinite(found[0] + found[3]);
        if (sound) advance(w, t, a, at + done, size, u, found);
        for (int j = 0; j < AHEAD_BY; j++) sums[j] += found[j];
        if (!sound) break;
    }
    sums[AHEAD_BY] = (double)done;
}

/* Writes the point of a chunk whose moments are written, or takes these back. */
static void follow_up(const Worker *w, const Tensor *t, const float *a, int64_t at, int64_t n,
                      int moves, const float *c) {
    float p[BLOCK], g[BLOCK], m[BLOCK], v[BLOCK];
    for (int64_t done = 0, size; done < n; done += size) {
        size = stretch(w, t, n - done);
        const int64_t padded = pieces(size, PADDED) * PADDED;
        float *momentum = fetch(w, t->momentum, at + done, size, m, 0);
        float *moment = fetch(w, t->square, at + done, size, v, 1);
        if (moves) {
            float *point = fetch(w, t->point, at + done, size, p, 0);
            w->loops->finish(padded, point, momentum, moment, a, c);
            stow(w, t->point, at + done, size, point);
        } else {
            const float *slope = fetch(w, t->slope, at + done, size, g, 0);
            w->loops->retreat(padded, slope, momentum, moment, a);
            stow(w, t->momentum, at + done, size, momentum);
            stow(w, t->square, at + done, size, moment);
        }
    }
}

/* Sums one chunk. Who sums the last one plans. */
static void sum_chunk(const Worker *w, Vector *v, int64_t i, int64_t phase) {
    const Tensor *t = v->tensor;
    const int64_t n = length(t), chunk = chunk_of(w->s, n, phase), from = i * chunk;
    double *sum = v->partial + i * NUMBERS;
    float a[8];
    factors(w, t, a);
    memset(sum, 0, NUMBERS * sizeof *sum);
    if (goes_ahead(w, t, phase))
        go_ahead(w, t, a, v->number * n + from, least(chunk, n - from), sum);
    else
        reduce(w, t, a, v->number * n + from, least(chunk, n - from), NULL, sum);
    if (!__atomic_sub_fetch(&v->left, 1, __ATOMIC_ACQ_REL)) add_up_and_plan(w, v, phase);
}

/* Writes one chunk, when all are summed. */
static void write_chunk(const Worker *w, const Vector *v, int64_t i, int64_t phase) {
    const Tensor *t = v->tensor;
    const int64_t n = length(t), chunk = chunk_of(w->s, n, phase), from = i * chunk;
    const int64_t at = v->number * n + from, size = least(chunk, n - from);
    float a[8];
    factors(w, t, a);
    for (int turns = 0; !__atomic_load_n(&v->ready, __ATOMIC_ACQUIRE); turns++)
        if (turns > PATIENCE) let_others_run();
    const int moves = written(w, v->fine, v->c);
    if (goes_ahead(w, t, phase))
        follow_up(w, t, a, at, moves ? size : (int64_t)v->partial[i * NUMBERS + AHEAD_BY],
                  moves, v->c);
    else if (moves)
        apply(w, t, a, at, size, NULL, v->c, AHEAD);
}

/* Each of `threads` threads has its own part of every vector. */
static void run_large(const Worker *w, Vector *vectors, int64_t count, int64_t me, int64_t threads,
                      int64_t phase) {
    for (Vector *v = vectors; v < vectors + count; v++) {
        const int64_t from = v->chunks * me / threads, to = v->chunks * (me + 1) / threads;
        for (int64_t i = from; i < to && phase != APPLY; i++) sum_chunk(w, v, i, phase);
        for (int64_t i = to; i-- > from && phase != REDUCE;) write_chunk(w, v, i, phase);
    }
}

/* Lists the large vectors; `vectors` and `partial` may be NULL to count only. Returns their
 * number, and that of their chunks in `chunks`. */
static int64_t list_large(const Settings *s, Tensor *tensors, int64_t count, int64_t phase,
                          Vector *vectors, double *partial, int64_t *chunks) {
    int64_t found = 0;
    *chunks = 0;
    for (int64_t i = 0; i < count; i++) {
        Tensor *t = tensors + i;
        const int64_t each = large(t) ? pieces(length(t), chunk_of(s, length(t), phase)) : 0;
        for (int64_t k = 0; k < t->batches * t->vectors && each; k++, found++, *chunks += each) {
            if (!vectors) continue;
            vectors[found] = (Vector){t, k, each, each, 0, 0, {0}, partial + *chunks * NUMBERS};
        }
    }
    return found;
}
