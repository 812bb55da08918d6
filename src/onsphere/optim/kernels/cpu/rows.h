/* Neighbours: vectors whose entries alternate in memory, taken together row by row. */

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
static int64_t turn_rows(const Worker *w, Tensor *t, int64_t batch, int64_t first,
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
        skipped += left(t, fine), kept += !written(w, fine, own_c);
        for (int64_t i = k * t->inner; i < (k + 1) * t->inner; i++) {
            still[i] = !written(w, fine, own_c);
            for (int j = 0; j < COEFFICIENTS; j++) c[j * BLOCK + i] = own_c[j];
        }
    }
    if (phase != REDUCE)
        follow_rows(w, t, at, across, keeps ? w->kept : NULL, c, kept ? still : NULL);
    return skipped;
}
