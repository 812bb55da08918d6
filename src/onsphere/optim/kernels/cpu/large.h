/* Large vectors: many chunks each, which threads take one by one. A thread that comes to writing
 * waits for the chunks that others are summing, and for nothing else. */

#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
static void let_others_run(void) { sched_yield(); }
#else
static void let_others_run(void) {}
#endif
enum { PATIENCE = 1000 };

/* Entries of a chunk. Those that are only read are read at several places at once, far apart. */
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
    if (!__atomic_sub_fetch(&v->left, 1, __ATOMIC_ACQ_REL)) add_up_and_plan(w, v, phase);
}

/* Writes one chunk, when all are summed: the last one first, which the cache may still hold. */
static void write_chunk(const Worker *w, Vector *v, int64_t i) {
    const Tensor *t = v->tensor;
    const int64_t n = length(t), from = (v->chunks - 1 - i) * CHUNK;
    float a[8];
    factors(w, t, a);
    for (int turns = 0; !__atomic_load_n(&v->ready, __ATOMIC_ACQUIRE); turns++)
        if (turns > PATIENCE) let_others_run();
    if (written(w, v->fine, v->c))
        apply(w, t, a, v->number * n + from, least(CHUNK, n - from), NULL, v->c, AHEAD);
}

static int64_t tasks_in(const Vector *v, int64_t phase) {
    return phase == STEP ? 2 * v->chunks : v->chunks;
}

/* Takes tasks in their order, so that what a chunk waits for has been begun. `next` is shared. */
static void run_large(const Worker *w, Vector *vectors, int64_t count, int64_t *next,
                      int64_t phase) {
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

/* Lists the large vectors; `vectors` and `partial` may be NULL to count only. Returns their
 * number, and that of their chunks in `chunks`. */
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
