/* One vector, or a few: sums, plan and writing.
 *
 * Reduce and apply work on one contiguous range of entries, block by block. */

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
            const float *u = kept ? kept + done : NULL;
            w->loops->drift(padded, point, slope, momentum, moment, a, u, c);
            stow(w, t->square, at + done, size, moment);
        }
        stow(w, t->point, at + done, size, point);
        stow(w, t->momentum, at + done, size, momentum);
    }
}

/* ---- a diagonal update of a vector that stays at hand: point and gradient are looked at first,
 * and where nothing speaks against them, both moments are written while the sums are taken. Only
 * where the moments are not finite themselves is a vector refused after that; they have gone on
 * then, and its point stays. ---- */

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
        w->loops->advance(pieces(size, PADDED) * PADDED, point, slope, momentum, moment, a,
                          u + done, found);
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
    if (!has_direction(w->s, length(t), sums[0], sums[3])) return;
    for (int64_t o = 0; o < t->outer; o++)
        advance(w, t, a, at + o * next, t->inner, u + o * t->inner, sums);
}

/* Writes a point whose update is known. */
static void write_point(const Worker *w, const Tensor *t, int64_t at, int64_t n, const float *u,
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

/* Whether a vector was left where it was; notes the lengths that have to be restored. */
static int left(Tensor *t, int verdict) {
    if (verdict == UNSURE) __atomic_add_fetch(&t->unsure, 1, __ATOMIC_RELAXED);
    return verdict == STAYS || verdict == REFUSED;
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
        write_point(w, t, at, t->inner, kept, c, next);
    else
        apply(w, t, a, at, t->inner, kept, c, next);
}

/* Vector number k: `outer` runs of `inner` entries from `at` on. */
static int64_t turn(const Worker *w, Tensor *t, int64_t k, int64_t at, int64_t phase) {
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
    return left(t, fine);
}

/* TOGETHER short vectors, one after the other in memory, from number k on: their plans are made at
 * once. */
static int64_t turn_together(const Worker *w, Tensor *t, int64_t k) {
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
        skipped += left(t, (int)group.verdict[i]);
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
