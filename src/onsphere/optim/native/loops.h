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

/* 1 / (s sqrt(max(x, tiny)) + e). With AVX-512 from 14 bits and one Newton step each: the exact
 * root and quotient would take longer than all the rest. */
INLINE vec NAME(weight_of)(vec x, float s, float e) {
#if LANES == 16
    const __m512 least = _mm512_max_ps((__m512)x, _mm512_set1_ps(FLT_MIN));
    vec inverse = (vec)_mm512_rsqrt14_ps(least);
    inverse *= 1.5f - 0.5f * (vec)least * inverse * inverse;
    const vec below = s * ((vec)least * inverse) + e;
    const vec about = (vec)_mm512_rcp14_ps((__m512)below);
    return about * (2.0f - below * about);
#elif LANES == 8
    const __m256 root = _mm256_sqrt_ps(_mm256_max_ps((__m256)x, _mm256_set1_ps(FLT_MIN)));
    return 1.0f / (s * (vec)root + e);
#else
    vec root;
    for (int i = 0; i < LANES; i++) root[i] = sqrtf(x[i] > FLT_MIN ? x[i] : FLT_MIN);
    return 1.0f / (s * root + e);
#endif
}

INLINE void NAME(flush)(int count, const vec *block, double *sums) {
    for (int i = 0; i < count; i++) {
        const wide lanes = __builtin_convertvector(block[i], wide);
#if LANES == 16
        __m512d half[2];
        memcpy(half, &lanes, sizeof half);
        sums[i] += _mm512_reduce_add_pd(half[0] + half[1]);
#else
        for (int lane = 0; lane < LANES; lane++) sums[i] += lanes[lane];
#endif
    }
}

#define LOAD(x) NAME(load)(x + i)
#define STORE(x, y) NAME(store)(x + i, y)
#define FETCH(x) __builtin_prefetch(x, 0, 1)
#define ENTRIES(i, from, to) for (long i = from; i < (to); i += LANES)
#define BLOCKS(from, to)                                                                      \
    for (long from = 0, to; to = from + FLUSH < n ? from + FLUSH : n, from < n; from = to)

/* <p,p> <p,g> <p,m> <g,g> <g,m> <m,m> */
TARGET static void NAME(gram)(long n, const float *p, const float *g, const float *m,
                              double *sums) {
    BLOCKS(from, to) {
        vec sum[6] = {{0}};
        ENTRIES(i, from, to) {
            const vec point = LOAD(p), slope = LOAD(g), momentum = LOAD(m);
            sum[0] += point * point, sum[1] += point * slope, sum[2] += point * momentum;
            sum[3] += slope * slope, sum[4] += slope * momentum, sum[5] += momentum * momentum;
        }
        NAME(flush)(6, sum, sums);
    }
}

/* p' = c0 p + c1 g + c2 m;  m' = c3 p + c4 g + c5 m. Meanwhile memory can fetch the next vector,
 * `ahead` entries further on. */
TARGET static void NAME(mix)(long n, float *p, const float *g, float *m, const float *c,
                             long ahead) {
    ENTRIES(i, 0, n) {
        FETCH(p + i + ahead), FETCH(g + i + ahead), FETCH(m + i + ahead);
        const vec point = LOAD(p), slope = LOAD(g), momentum = LOAD(m);
        STORE(p, c[0] * point + c[1] * slope + c[2] * momentum);
        STORE(m, c[3] * point + c[4] * slope + c[5] * momentum);
    }
}

/* p' = c0 p + c1 g */
TARGET static void NAME(blend)(long n, float *p, const float *g, const float *c) {
    ENTRIES(i, 0, n) STORE(p, c[0] * LOAD(p) + c[1] * LOAD(g));
}

/* w = 1 / (s sqrt(b2 v + k2 g^2) + e) */
INLINE vec NAME(weight)(vec square, vec moment, const float *a) {
    return NAME(weight_of)(a[2] * moment + a[3] * square, a[4], a[5]);
}

/* With h = b1 m + k1 g:
 * <p,p> <p,h> <p,hw> <p,pw> <hw,hw> <hw,pw> <pw,pw> <h,hw> <h,pw> <g,g>.   w goes to `kept`. */
TARGET static void NAME(moments)(long n, const float *p, const float *g, const float *m,
                                 const float *v, const float *a, float *kept, double *sums) {
    BLOCKS(from, to) {
        vec sum[10] = {{0}};
        ENTRIES(i, from, to) {
            const vec point = LOAD(p), slope = LOAD(g), square = slope * slope;
            const vec h = a[0] * LOAD(m) + a[1] * slope;
            const vec w = NAME(weight)(square, LOAD(v), a);
            const vec u = h * w, q = point * w;
            if (kept) STORE(kept, w);
            sum[0] += point * point, sum[1] += point * h, sum[2] += point * u;
            sum[3] += point * q, sum[4] += u * u, sum[5] += u * q, sum[6] += q * q;
            sum[7] += h * u, sum[8] += h * q, sum[9] += square;
        }
        NAME(flush)(10, sum, sums);
    }
}

/* With u = (h - c0 p) w:  p' = c1 p + c2 u;  m' = h + c3 p + c4 u;  v'. */
TARGET static void NAME(drift)(long n, float *p, const float *g, float *m, float *v,
                               const float *a, const float *kept, const float *c, long ahead) {
    ENTRIES(i, 0, n) {
        FETCH(p + i + ahead), FETCH(g + i + ahead), FETCH(m + i + ahead), FETCH(v + i + ahead);
        const vec point = LOAD(p), slope = LOAD(g), square = slope * slope, moment = LOAD(v);
        const vec h = a[0] * LOAD(m) + a[1] * slope;
        const vec w = kept ? LOAD(kept) : NAME(weight)(square, moment, a);
        const vec u = (h - c[0] * point) * w;
        STORE(v, a[2] * moment + a[3] * square);
        STORE(p, c[1] * point + c[2] * u);
        STORE(m, h + c[3] * point + c[4] * u);
    }
}

/* <p,p> <1,p> */
TARGET static void NAME(size)(long n, const float *p, double *sums) {
    BLOCKS(from, to) {
        vec sum[2] = {{0}};
        ENTRIES(i, from, to) {
            const vec point = LOAD(p);
            sum[0] += point * point, sum[1] += point;
        }
        NAME(flush)(2, sum, sums);
    }
}

/* p' = c0 p + c1 */
TARGET static void NAME(scale)(long n, float *p, const float *c) {
    ENTRIES(i, 0, n) STORE(p, c[0] * LOAD(p) + c[1]);
}

TARGET static void NAME(widen)(long n, const uint16_t *from, float *to) {
    for (long i = 0; i < n; i++) {
        const uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(&to[i], &bits, 4);
    }
}

/* To nearest, ties to even; NaN stays NaN. */
TARGET static void NAME(narrow)(long n, const float *from, uint16_t *to) {
    for (long i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &from[i], 4);
        const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        to[i] = (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
    }
}

static const Loops NAME(loops) = {NAME(gram), NAME(mix),   NAME(blend), NAME(moments), NAME(drift),
                                  NAME(size), NAME(scale), NAME(widen), NAME(narrow)};
#undef INLINE
#undef LOAD
#undef STORE
#undef FETCH
#undef ENTRIES
#undef BLOCKS
#undef vec
#undef wide
