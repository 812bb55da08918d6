/* The loops over the entries of one vector: contiguous floats, a multiple of PADDED of them.
 *
 * kernel.c includes this file once per instruction set, with NAME(x), TARGET and LANES defined. A
 * sum runs in float over FLUSH entries and is then added to `sums` in double.
 */

#define INLINE TARGET static inline __attribute__((always_inline))
#define vec NAME(vec)
#define factors NAME(factors)
#define moment NAME(moment)
#define wide NAME(wide)

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef double wide __attribute__((vector_size(8 * LANES)));

INLINE vec NAME(load)(const float *x) {
    vec y;
    memcpy(&y, x, sizeof y);
    return y;
}

INLINE void NAME(store)(float *x, vec y) { memcpy(x, &y, sizeof y); }

/* What a diagonal update is made of, in every lane: h = b1 m + k1 g, v' = b2 v + k2 g^2, and
 * u = h / (s sqrt(v') + e). In registers: what lies in memory is read again after every store. */
typedef struct {
    vec b1, k1, b2, k2, s, e, half_s, least;
} factors;

INLINE factors NAME(factors_of)(const float *a) {
    const vec none = {0};
    return (factors){none + a[0], none + a[1],        none + a[2],     none + a[3],
                     none + a[4], none + a[5], none + 0.5f * a[4], none + FLT_MIN};
}

/* h / (s sqrt(x) + e) for x > 0. With AVX-512 the root comes from 14 bits and one Newton step: the
 * exact one and the quotient would wait for each other. What is infinite is divided by as the
 * largest number is: 0 times it is none. */
INLINE vec NAME(divided)(vec h, vec x, const factors *f) {
#if LANES == 16
    x = (vec)_mm512_min_ps(_mm512_set1_ps(FLT_MAX), (__m512)x);
    const vec inverse = (vec)_mm512_rsqrt14_ps((__m512)x), root = x * inverse;
    const vec rest = x - root * root;
    return h / (f->s * root + f->e + f->half_s * inverse * rest);
#elif LANES == 8
    return h / (f->s * (vec)_mm256_sqrt_ps((__m256)x) + f->e);
#else
    vec root;
    for (int i = 0; i < LANES; i++) root[i] = sqrtf(x[i]);
    return h / (f->s * root + f->e);
#endif
}

INLINE void NAME(flush)(int count, const vec *block, double *sums) {
    for (int i = 0; i < count; i++) {
#if LANES == 16
        sums[i] += _mm512_reduce_add_ps((__m512)block[i]);
#else
        const wide lanes = __builtin_convertvector(block[i], wide);
        for (int lane = 0; lane < LANES; lane++) sums[i] += lanes[lane];
#endif
    }
}

/* ---- what one group of entries contributes, and what becomes of it ---- */

/* <p,p> <p,g> <p,m> <g,g> <g,m> <m,m> */
INLINE void NAME(gram_of)(const float *p, const float *g, const float *m, vec *x) {
    const vec point = NAME(load)(p), slope = NAME(load)(g), momentum = NAME(load)(m);
    x[0] = point * point, x[1] = point * slope, x[2] = point * momentum;
    x[3] = slope * slope, x[4] = slope * momentum, x[5] = momentum * momentum;
}

/* p' = c0 p + c1 g + c2 m;  m' = c3 p + c4 g + c5 m */
INLINE void NAME(mix_of)(float *p, const float *g, float *m, const vec *c) {
    const vec point = NAME(load)(p), slope = NAME(load)(g), momentum = NAME(load)(m);
    NAME(store)(p, c[0] * point + c[1] * slope + c[2] * momentum);
    NAME(store)(m, c[3] * point + c[4] * slope + c[5] * momentum);
}

/* Both moments of one group of entries after the step, and the update. */
typedef struct {
    vec h, square, next, u;
} moment;

/* A second moment of zero counts as the least float. */
INLINE moment NAME(moment_of)(vec g, vec m, vec v, const factors *f) {
    moment x;
    x.h = f->b1 * m + f->k1 * g, x.square = g * g, x.next = f->b2 * v + f->k2 * x.square;
    x.u = NAME(divided)(x.h, x.next + f->least, f);
    return x;
}

/* <p,p> <p,u> <u,u> <g,g>, and |k1 g w|^2, the share of news in u, if that is asked for. */
INLINE void NAME(sums_of)(vec p, vec g, const moment *y, const factors *f, const int news, vec *x) {
    x[0] = p * p, x[1] = p * y->u, x[2] = y->u * y->u, x[3] = y->square;
    if (news) {
        const vec share = NAME(divided)(f->k1 * g, y->next + f->least, f);
        x[4] = share * share;
    }
}

INLINE void NAME(moments_of)(const float *p, const float *g, const float *m, const float *v,
                             const factors *f, const int news, float *kept, vec *x) {
    const moment y = NAME(moment_of)(NAME(load)(g), NAME(load)(m), NAME(load)(v), f);
    if (kept) NAME(store)(kept, y.u);
    NAME(sums_of)(NAME(load)(p), NAME(load)(g), &y, f, news, x);
}

/* <p,p> <g,g> */
INLINE void NAME(look_of)(const float *p, const float *g, vec *x) {
    const vec point = NAME(load)(p), slope = NAME(load)(g);
    x[0] = point * point, x[1] = slope * slope;
}

/* <p,u> <u,u>, and |k1 g w|^2 if that is asked for. Writes u, m' = h and v' = next. */
INLINE void NAME(advance_of)(const float *p, const float *g, float *m, float *v, const factors *f,
                             const int news, float *u, vec *x) {
    vec all[NUMBERS];
    const moment y = NAME(moment_of)(NAME(load)(g), NAME(load)(m), NAME(load)(v), f);
    NAME(store)(u, y.u), NAME(store)(m, y.h), NAME(store)(v, y.next);
    NAME(sums_of)(NAME(load)(p), NAME(load)(g), &y, f, news, all);
    x[0] = all[1], x[1] = all[2];
    if (news) x[2] = all[4];
}

/* p' = c0 p + c1 u;  m' = h;  v' = next. */
INLINE void NAME(drift_of)(float *p, const float *g, float *m, float *v, const factors *f,
                           const float *kept, const vec *c) {
    const vec point = NAME(load)(p);
    moment y = NAME(moment_of)(NAME(load)(g), NAME(load)(m), NAME(load)(v), f);
    if (kept) y.u = NAME(load)(kept);
    NAME(store)(v, y.next), NAME(store)(m, y.h);
    NAME(store)(p, c[0] * point + c[1] * y.u);
}

/* p' = c0 p + c1 u, of moments that were written. */
INLINE void NAME(finish_of)(float *p, const float *m, const float *v, const factors *f,
                            const vec *c) {
    const vec u = NAME(divided)(NAME(load)(m), NAME(load)(v) + f->least, f);
    NAME(store)(p, c[0] * NAME(load)(p) + c[1] * u);
}

/* What `sum` was before `added` came to it, to rounding: what is less than that is nothing. */
FLAT float NAME(without)(float sum, float added) {
    const float rest = sum - added;
    return fabsf(rest) <= 2 * FLT_EPSILON * fabsf(added) ? 0 : rest;
}

/* m = (h - k1 g) / b1 and v = (next - k2 g^2) / b2 */
INLINE void NAME(retreat_of)(const float *g, float *m, float *v, const factors *f) {
    const vec slope = NAME(load)(g), news = f->k1 * slope, square = f->k2 * slope * slope;
    for (int i = 0; i < LANES; i++) {
        m[i] = NAME(without)(m[i], news[i]) / f->b1[i];
        v[i] = NAME(without)(v[i], square[i]) / f->b2[i];
    }
}

/* <p,p> <1,p> */
INLINE void NAME(size_of)(const float *p, vec *x) {
    x[1] = NAME(load)(p), x[0] = x[1] * x[1];
}

/* p' = c0 p + c1 */
INLINE void NAME(scale_of)(float *p, const vec *c) {
    NAME(store)(p, c[0] * NAME(load)(p) + c[1]);
}

/* p' = c0 p + c1 g */
INLINE void NAME(blend_of)(float *p, const float *g, const vec *c) {
    NAME(store)(p, c[0] * NAME(load)(p) + c[1] * NAME(load)(g));
}

INLINE void NAME(all_alike)(const float *c, vec *all) {
    for (int j = 0; j < COEFFICIENTS; j++) all[j] = (vec){0} + c[j];
}

/* ---- along a vector: sums over its entries, one set of coefficients ----
 *
 * Memory gives most where all arrays of a step are read side by side, from front to back, and where
 * it is asked for a little AHEAD. It comes into the second level of the cache: in the first one,
 * where arrays lie alike within their pages, there is no place. */

#define FETCH(x) __builtin_prefetch((x) + i + AHEAD, 0, 2)
#define FETCH_HERE(x) __builtin_prefetch((x) + i, 0, 2)
#define ENTRIES for (int64_t i = 0; i < n; i += LANES)

#define SUM_UP(count, terms)                                                                  \
    for (int64_t from = 0, to; to = from + FLUSH < n ? from + FLUSH : n, from < n; from = to) {  \
        vec sum[count] = {{0}}, x[count];                                                     \
        for (int64_t i = from; i < to; i += LANES) {                                             \
            terms;                                                                            \
            _Pragma("GCC unroll 10") for (int j = 0; j < count; j++) sum[j] += x[j];          \
        }                                                                                     \
        NAME(flush)(count, sum, sums);                                                        \
    }

TARGET static void NAME(gram)(int64_t n, const float *p, const float *g, const float *m,
                              double *sums) {
    SUM_UP(6, (FETCH(p), FETCH(g), FETCH(m), NAME(gram_of)(p + i, g + i, m + i, x)))
}

TARGET static void NAME(moments)(int64_t n, const float *p, const float *g, const float *m,
                                 const float *v, const float *a, float *kept, double *sums) {
    const factors f = NAME(factors_of)(a);
#define TERMS(news)                                                                           \
    NAME(moments_of)(p + i, g + i, m + i, v + i, &f, news, kept ? kept + i : NULL, x)
    if (a[NEWS] != 0) {
        SUM_UP(5, TERMS(1))
    } else {
        SUM_UP(4, TERMS(0))
    }
#undef TERMS
}

/* Asks for the moments, which are wanted next. */
TARGET static void NAME(look)(int64_t n, const float *p, const float *g, const float *m,
                              const float *v, double *sums) {
    SUM_UP(2, (FETCH_HERE(m), FETCH_HERE(v), NAME(look_of)(p + i, g + i, x)))
}

TARGET static void NAME(advance)(int64_t n, const float *p, const float *g, float *m, float *v,
                                 const float *a, float *u, double *sums) {
    const factors f = NAME(factors_of)(a);
    if (a[NEWS] != 0) {
        SUM_UP(3, NAME(advance_of)(p + i, g + i, m + i, v + i, &f, 1, u + i, x))
    } else {
        SUM_UP(2, NAME(advance_of)(p + i, g + i, m + i, v + i, &f, 0, u + i, x))
    }
}

TARGET static void NAME(size)(int64_t n, const float *p, double *sums) {
    SUM_UP(2, (FETCH(p), NAME(size_of)(p + i, x)))
}

/* The same of a long range, read at STREAMS places at once: one array read from end to end does not
 * keep memory busy and takes 1.3 times as long. */
TARGET static void NAME(sizes)(int64_t n, const float *p, double *sums) {
    const int64_t part = n / STREAMS / LANES * LANES;
    for (int64_t from = 0, to; to = from + FLUSH / STREAMS < part ? from + FLUSH / STREAMS : part,
                            from < part; from = to) {
        vec sum[2] = {{0}}, x[2];
        for (int64_t i = from; i < to; i += LANES)
            _Pragma("GCC unroll 8") for (int stream = 0; stream < STREAMS; stream++) {
                NAME(size_of)(p + stream * part + i, x);
                sum[0] += x[0], sum[1] += x[1];
            }
        NAME(flush)(2, sum, sums);
    }
    NAME(size)(n - STREAMS * part, p + STREAMS * part, sums);
}

TARGET static void NAME(mix)(int64_t n, float *p, const float *g, float *m, const float *c) {
    vec all[COEFFICIENTS];
    NAME(all_alike)(c, all);
    ENTRIES NAME(mix_of)(p + i, g + i, m + i, all);
}

/* Asks for what is wanted `next`, and for the point after this one. */
TARGET static void NAME(blend)(int64_t n, float *p, const float *g, const float *c,
                               const float *next) {
    vec all[COEFFICIENTS];
    NAME(all_alike)(c, all);
    ENTRIES {
        FETCH_HERE(next), FETCH_HERE(p + n);
        NAME(blend_of)(p + i, g + i, all);
    }
}

TARGET static void NAME(drift)(int64_t n, float *p, const float *g, float *m, float *v,
                               const float *a, const float *kept, const float *c) {
    const factors f = NAME(factors_of)(a);
    vec all[COEFFICIENTS];
    NAME(all_alike)(c, all);
    if (kept) {
        ENTRIES NAME(drift_of)(p + i, g + i, m + i, v + i, &f, kept + i, all);
    } else {
        ENTRIES NAME(drift_of)(p + i, g + i, m + i, v + i, &f, NULL, all);
    }
}

TARGET static void NAME(finish)(int64_t n, float *p, const float *m, const float *v,
                                const float *a, const float *c) {
    const factors f = NAME(factors_of)(a);
    vec all[COEFFICIENTS];
    NAME(all_alike)(c, all);
    ENTRIES NAME(finish_of)(p + i, m + i, v + i, &f, all);
}

TARGET static void NAME(retreat)(int64_t n, const float *g, float *m, float *v, const float *a) {
    const factors f = NAME(factors_of)(a);
    ENTRIES NAME(retreat_of)(g + i, m + i, v + i, &f);
}

TARGET static void NAME(scale)(int64_t n, float *p, const float *c) {
    vec all[COEFFICIENTS];
    NAME(all_alike)(c, all);
    ENTRIES NAME(scale_of)(p + i, all);
}

/* ---- across vectors: every entry has sums (number j at sums[j * BLOCK]) and coefficients ---- */

#define FETCH_ROW(x) __builtin_prefetch((x) + i + ahead, 0, 2)
#define FETCH_ROWS FETCH_ROW(p), FETCH_ROW(g), FETCH_ROW(m), FETCH_ROW(v)
#define ADD_UP(count, terms)                                                                  \
    ENTRIES {                                                                                 \
        FETCH_ROWS;                                                                            \
        vec x[count];                                                                         \
        terms;                                                                                \
        _Pragma("GCC unroll 10") for (int j = 0; j < count; j++) {                            \
            float *sum = sums + j * BLOCK + i;                                                \
            NAME(store)(sum, NAME(load)(sum) + x[j]);                                         \
        }                                                                                     \
    }
#define OWN_COEFFICIENTS                                                                      \
    vec own[COEFFICIENTS];                                                                    \
    _Pragma("GCC unroll 6") for (int j = 0; j < COEFFICIENTS; j++)                            \
        own[j] = NAME(load)(c + j * BLOCK + i);

TARGET static void NAME(add)(const Rows *r, float *sums) {
    const int64_t n = r->n, ahead = r->ahead;
    const float *p = r->p, *g = r->g, *m = r->m, *v = r->v;
    if (r->kind == RESTORE) {
        ADD_UP(2, NAME(size_of)(p + i, x))
    } else if (r->kind == LINEAR) {
        ADD_UP(6, NAME(gram_of)(p + i, g + i, m + i, x))
    } else {
        const factors f = NAME(factors_of)(r->a);
        float *kept = r->kept;
#define TERMS(news)                                                                           \
    NAME(moments_of)(p + i, g + i, m + i, v + i, &f, news, kept ? kept + i : NULL, x)
        if (r->a[NEWS] != 0) {
            ADD_UP(5, TERMS(1))
        } else {
            ADD_UP(4, TERMS(0))
        }
#undef TERMS
    }
}

TARGET static void NAME(follow)(const Rows *r, const float *c) {
    const int64_t n = r->n, ahead = r->ahead;
    float *p = r->p, *m = r->m, *v = r->v;
    const float *g = r->g;
    const factors f = NAME(factors_of)(r->a);
    ENTRIES {
        FETCH_ROWS;
        OWN_COEFFICIENTS
        if (r->kind == RESTORE) {
            NAME(scale_of)(p + i, own);
        } else if (r->kind == DIAGONAL) {
            NAME(drift_of)(p + i, g + i, m + i, v + i, &f, r->kept ? r->kept + i : NULL, own);
        } else if (r->moving) {
            NAME(mix_of)(p + i, g + i, m + i, own);
        } else {
            NAME(blend_of)(p + i, g + i, own);
        }
    }
}

/* ---- half precision ---- */

TARGET static void NAME(widen)(int64_t n, const uint16_t *from, float *to) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(&to[i], &bits, 4);
    }
}

/* To nearest, ties to even; NaN stays NaN. */
TARGET static void NAME(narrow)(int64_t n, const float *from, uint16_t *to) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &from[i], 4);
        const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        to[i] = (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
    }
}

/* ---- plans ---- */

#define PLAN_ALL(kind, way)                                                                   \
    for (int i = 0; i < TOGETHER; i++) {                                                      \
        const double x[NUMBERS] = {v->x[0][i], v->x[1][i], v->x[2][i],                        \
                                   v->x[3][i], v->x[4][i], v->x[5][i]};                       \
        s.lr_mode = way;                                                                        \
        const Plan made = plan(&s, &t, n, x, (Own){v->radius[i], v->second[i]}, kind, 0);     \
        v->radius[i] = made.own.radius;                                                       \
        for (int j = 0; j < COEFFICIENTS; j++) v->c[j][i] = made.c[j];                        \
        v->verdict[i] = made.verdict;                                                         \
    }

TARGET static void NAME(plans)(const Settings *settings, const Tensor *tensor, double n, Group *v) {
    Settings s = *settings; /* copies, which nothing that is written can change */
    const Tensor t = *tensor;
    if (s.kind == RESTORE) {
        PLAN_ALL(RESTORE, RATE)
    } else if (s.kind == LINEAR && s.lr_mode == RATE) {
        PLAN_ALL(LINEAR, RATE)
    } else if (s.kind == LINEAR && s.lr_mode == HARD) {
        PLAN_ALL(LINEAR, HARD)
    } else if (s.kind == LINEAR) {
        PLAN_ALL(LINEAR, RELATIVE)
    } else if (s.lr_mode == RATE) {
        PLAN_ALL(DIAGONAL, RATE)
    } else if (s.lr_mode == HARD) {
        PLAN_ALL(DIAGONAL, HARD)
    } else {
        PLAN_ALL(DIAGONAL, RELATIVE)
    }
}

static const Loops NAME(loops) = {NAME(gram),  NAME(mix),     NAME(blend), NAME(moments),
                                  NAME(look),  NAME(advance), NAME(finish), NAME(retreat),
                                  NAME(drift), NAME(size),
                                  NAME(sizes), NAME(scale),   NAME(add),   NAME(follow),
                                  NAME(widen), NAME(narrow),  NAME(plans)};
#undef INLINE
#undef SUM_UP
#undef ADD_UP
#undef PLAN_ALL
#undef OWN_COEFFICIENTS
#undef FETCH_ROWS
#undef FETCH_ROW
#undef FETCH_HERE
#undef FETCH
#undef ENTRIES
#undef vec
#undef factors
#undef moment
#undef wide
