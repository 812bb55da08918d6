/* The loops over the entries of one vector: contiguous floats, a multiple of PADDED of them.
 *
 * kernel.c includes this file once per instruction set, with NAME(x), TARGET and LANES defined. A
 * sum runs in float over FLUSH entries and is then added to `sums` in double.
 */

#define INLINE TARGET static inline __attribute__((always_inline))
#define vec NAME(vec)
#define wide NAME(wide)

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef double wide __attribute__((vector_size(8 * LANES)));

INLINE vec NAME(load)(const float *x) {
    vec y;
    memcpy(&y, x, sizeof y);
    return y;
}

INLINE void NAME(store)(float *x, vec y) { memcpy(x, &y, sizeof y); }

/* 1 / (s sqrt(x) + e) for x > 0. With AVX-512 from 14 bits and one Newton step each: the exact root
 * and quotient would take longer than all the rest. */
INLINE vec NAME(weight_of)(vec x, float s, float e) {
#if LANES == 16
    const vec inverse = (vec)_mm512_rsqrt14_ps((__m512)x), root = x * inverse;
    const vec below = root * (1.5f * s - (0.5f * s) * inverse * root) + e;
    const vec about = (vec)_mm512_rcp14_ps((__m512)below);
    return about * (2.0f - below * about);
#elif LANES == 8
    return 1.0f / (s * (vec)_mm256_sqrt_ps((__m256)x) + e);
#else
    vec root;
    for (int i = 0; i < LANES; i++) root[i] = sqrtf(x[i]);
    return 1.0f / (s * root + e);
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

/* w = 1 / (s sqrt(b2 v + k2 g^2) + e), where a moment of zero counts as the least float */
INLINE vec NAME(weight)(vec square, vec moment, const float *a) {
    return NAME(weight_of)(a[2] * moment + FLT_MIN + a[3] * square, a[4], a[5]);
}

/* With u = (b1 m + k1 g) w: <p,p> <p,u> <u,u> <g,g>, and |k1 g w|^2 if a[NEWS]. u goes to `kept`. */
INLINE void NAME(moments_of)(const float *p, const float *g, const float *m, const float *v,
                             const float *a, float *kept, vec *x) {
    const vec point = NAME(load)(p), slope = NAME(load)(g), square = slope * slope;
    const vec h = a[0] * NAME(load)(m) + a[1] * slope;
    const vec w = NAME(weight)(square, NAME(load)(v), a), u = h * w;
    if (kept) NAME(store)(kept, u);
    x[0] = point * point, x[1] = point * u, x[2] = u * u, x[3] = square, x[4] = (vec){0};
    if (a[NEWS] != 0) {
        const vec news = a[1] * slope * w;
        x[4] = news * news;
    }
}

/* p' = c0 p + c1 u;  m' = b1 m + k1 g;  v' = b2 v + k2 g^2. */
INLINE void NAME(drift_of)(float *p, const float *g, float *m, float *v, const float *a,
                           const float *kept, const vec *c) {
    const vec point = NAME(load)(p), slope = NAME(load)(g), moment = NAME(load)(v);
    const vec square = slope * slope, h = a[0] * NAME(load)(m) + a[1] * slope;
    const vec u = kept ? NAME(load)(kept) : h * NAME(weight)(square, moment, a);
    NAME(store)(v, a[2] * moment + a[3] * square);
    NAME(store)(p, c[0] * point + c[1] * u);
    NAME(store)(m, h);
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
 * The loops ask for memory `ahead` entries further on, where the next vector begins. Half of the
 * arrays are asked for while the sums are taken and half while the vector is written, so that
 * memory is busy throughout: all of them in one of the two takes a fifth more time. It comes into
 * the second level of the cache: the arrays tend to lie alike within their pages, so that two
 * vectors of four of them do not find place in the first one, which took a fifth more time, too. */

#define FETCH(x) __builtin_prefetch((x) + i + ahead, 0, 2)
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
                              double *sums, int64_t ahead) {
    SUM_UP(6, (FETCH(p), NAME(gram_of)(p + i, g + i, m + i, x)))
}

TARGET static void NAME(moments)(int64_t n, const float *p, const float *g, const float *m,
                                 const float *v, const float *a, float *kept, double *sums,
                                 int64_t ahead) {
    SUM_UP(5, (FETCH(p), FETCH(g),
               NAME(moments_of)(p + i, g + i, m + i, v + i, a, kept ? kept + i : NULL, x)))
}

TARGET static void NAME(size)(int64_t n, const float *p, double *sums, int64_t ahead) {
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
    NAME(size)(n - STREAMS * part, p + STREAMS * part, sums, 0);
}

TARGET static void NAME(mix)(int64_t n, float *p, const float *g, float *m, const float *c,
                             int64_t ahead) {
    vec all[COEFFICIENTS];
    NAME(all_alike)(c, all);
    ENTRIES {
        FETCH(g), FETCH(m);
        NAME(mix_of)(p + i, g + i, m + i, all);
    }
}

TARGET static void NAME(blend)(int64_t n, float *p, const float *g, const float *c) {
    vec all[COEFFICIENTS];
    NAME(all_alike)(c, all);
    ENTRIES NAME(blend_of)(p + i, g + i, all);
}

TARGET static void NAME(drift)(int64_t n, float *p, const float *g, float *m, float *v,
                               const float *a, const float *kept, const float *c, int64_t ahead) {
    vec all[COEFFICIENTS];
    NAME(all_alike)(c, all);
    ENTRIES {
        FETCH(m), FETCH(v);
        NAME(drift_of)(p + i, g + i, m + i, v + i, a, kept ? kept + i : NULL, all);
    }
}

TARGET static void NAME(scale)(int64_t n, float *p, const float *c) {
    vec all[COEFFICIENTS];
    NAME(all_alike)(c, all);
    ENTRIES NAME(scale_of)(p + i, all);
}

/* ---- across vectors: every entry has sums (number j at sums[j * BLOCK]) and coefficients ---- */

#define FETCH_ROW FETCH(p), FETCH(g), FETCH(m), FETCH(v)
#define ADD_UP(count, terms)                                                                  \
    ENTRIES {                                                                                 \
        FETCH_ROW;                                                                            \
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
        ADD_UP(5, NAME(moments_of)(p + i, g + i, m + i, v + i, r->a,
                                   r->kept ? r->kept + i : NULL, x))
    }
}

TARGET static void NAME(follow)(const Rows *r, const float *c) {
    const int64_t n = r->n, ahead = r->ahead;
    float *p = r->p, *m = r->m, *v = r->v;
    const float *g = r->g;
    ENTRIES {
        FETCH_ROW;
        OWN_COEFFICIENTS
        if (r->kind == RESTORE) {
            NAME(scale_of)(p + i, own);
        } else if (r->kind == DIAGONAL) {
            NAME(drift_of)(p + i, g + i, m + i, v + i, r->a, r->kept ? r->kept + i : NULL, own);
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
    } else if (s.kind == LINEAR) {
        PLAN_ALL(LINEAR, RELATIVE)
    } else if (s.lr_mode == RATE) {
        PLAN_ALL(DIAGONAL, RATE)
    } else {
        PLAN_ALL(DIAGONAL, RELATIVE)
    }
}

static const Loops NAME(loops) = {NAME(gram),  NAME(mix), NAME(blend),  NAME(moments), NAME(drift),
                                  NAME(size),  NAME(sizes), NAME(scale), NAME(add), NAME(follow),
                                  NAME(widen), NAME(narrow), NAME(plans)};
#undef INLINE
#undef SUM_UP
#undef ADD_UP
#undef PLAN_ALL
#undef OWN_COEFFICIENTS
#undef FETCH_ROW
#undef FETCH
#undef ENTRIES
#undef vec
#undef wide
