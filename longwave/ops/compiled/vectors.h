/* Sixteen floats at a time, in the vector extension that GCC and Clang share; the compiler maps it to the machine. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
#define WORTH_THREADS 65536 /* for fewer products, waking other threads takes longer than they would save */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(64)));
typedef float half_vec __attribute__((vector_size(32)));
typedef float quarter_vec __attribute__((vector_size(16)));
typedef int32_t vec_i32 __attribute__((vector_size(64)));
typedef uint32_t vec_u32 __attribute__((vector_size(64)));
typedef uint16_t vec_u16 __attribute__((vector_size(32)));

/* An array of bf16 or of fp32 numbers. */
typedef struct {
    const char *data;
    int is_bf16;
} array;

INLINE vec splat(float x) { return (vec){0} + x; }

/* The rest of an array from entry `at` on. */
INLINE array from(array a, int64_t at) { return (array){a.data + at * (a.is_bf16 ? 2 : 4), a.is_bf16}; }

INLINE vec larger(vec a, vec b) {
#ifdef __AVX512F__
    return (vec)_mm512_max_ps((__m512)b, (__m512)a);
#endif
    vec_i32 more = b > a;
    return (vec)(((vec_i32)b & more) | ((vec_i32)a & ~more));
}

INLINE vec load_f32(const float *from) {
    vec out;
    memcpy(&out, from, sizeof out);
    return out;
}

INLINE void store_f32(float *to, vec x) { memcpy(to, &x, sizeof x); }

/* Sixteen entries from place `at` on: a bf16 number is the upper half of the fp32 number of the same value. */
INLINE vec load(array a, int64_t at) {
    if (!a.is_bf16)
        return load_f32((const float *)a.data + at);
    vec_u16 halves;
    memcpy(&halves, a.data + 2 * at, sizeof halves);
    return (vec)(__builtin_convertvector(halves, vec_u32) << 16);
}

/* sums + the products of CHUNK entries of two arrays of one type. */
#define CHUNK 32
INLINE vec add_products(vec sums, array a, int64_t at_a, array b, int64_t at_b) {
#ifdef __AVX512BF16__
    if (a.is_bf16) {
        __m512i x = _mm512_loadu_si512(a.data + 2 * at_a), y = _mm512_loadu_si512(b.data + 2 * at_b);
        return (vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)x, (__m512bh)y);
    }
#endif
    sums += load(a, at_a) * load(b, at_b);
    return sums + load(a, at_a + LANES) * load(b, at_b + LANES);
}

INLINE void prefetch(array a, int64_t at, int bytes_ahead) {
    __builtin_prefetch(a.data + at * (a.is_bf16 ? 2 : 4) + bytes_ahead);
}

INLINE float number(array a, int64_t at) {
    if (!a.is_bf16)
        return ((const float *)a.data)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)a.data)[at] << 16;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

/* Stores a number in an array; in bf16 it is rounded to the nearest, and to even in a tie. */
INLINE void put(void *data, int is_bf16, int64_t at, float x) {
    if (!is_bf16) {
        ((float *)data)[at] = x;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits = x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
    ((uint16_t *)data)[at] = (uint16_t)bits;
}

/* Stores sixteen numbers in an array from place `at` on, rounded as by `put`. */
INLINE void put_vec(void *data, int is_bf16, int64_t at, vec x) {
    if (!is_bf16) {
        store_f32((float *)data + at, x);
        return;
    }
#ifdef __AVX512BF16__
    __m256bh half = _mm512_cvtneps_pbh((__m512)x);
    memcpy((char *)data + 2 * at, &half, sizeof half);
#else
    for (int i = 0; i < LANES; i++)
        put(data, 1, at + i, x[i]);
#endif
}

INLINE float sum(vec x) {
    half_vec parts[2];
    memcpy(parts, &x, sizeof parts);
    half_vec eight = parts[0] + parts[1];
    quarter_vec fours[2];
    memcpy(fours, &eight, sizeof fours);
    quarter_vec four = fours[0] + fours[1];
    return (four[0] + four[1]) + (four[2] + four[3]);
}

/* 2^x to 2e-7 relative: 2^n 2^f with |f| <= 1/2, and the polynomial of 2^f of least relative error with p(0) = 1. */
INLINE vec exp2_of(vec x) {
#ifdef __AVX512F__
    x = (vec)_mm512_min_ps((__m512)splat(200), _mm512_max_ps((__m512)splat(-200), (__m512)x)); /* NaN stays */
    vec n = (vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    vec_i32 under = x < -127.0f, over = x > 128.0f;
    x = (vec)(((vec_i32)x & ~under & ~over) | ((vec_i32)splat(-127) & under) | ((vec_i32)splat(128) & over));
    vec half = (vec)(((vec_i32)x & INT32_MIN) | (vec_i32)splat(0.5f));
    vec_i32 whole = __builtin_convertvector(x + half, vec_i32); /* towards zero */
    vec n = __builtin_convertvector(whole, vec);
#endif
    vec f = x - n;
    vec p = splat(1.32647239e-3f);
    p = p * f + 9.67151287e-3f;
    p = p * f + 5.55073375e-2f;
    p = p * f + 0.240222421f;
    p = p * f + 0.693146978f;
    p = p * f + 1.0f;
#ifdef __AVX512F__
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return p * (vec)((whole + 127) << 23);
#endif
}

#define LOG2E 1.44269504088896341f
INLINE vec exp_negative(vec x) { return exp2_of(x * LOG2E); }

INLINE float largest_of(vec x) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)x);
#endif
    half_vec parts[2];
    memcpy(parts, &x, sizeof parts);
    typedef int32_t half_i32 __attribute__((vector_size(32)));
    half_i32 more = parts[1] > parts[0];
    half_vec eight = (half_vec)(((half_i32)parts[1] & more) | ((half_i32)parts[0] & ~more));
    float most[4];
    for (int i = 0; i < 4; i++)
        most[i] = eight[i] > eight[i + 4] ? eight[i] : eight[i + 4];
    most[0] = most[0] > most[2] ? most[0] : most[2];
    most[1] = most[1] > most[3] ? most[1] : most[3];
    return most[0] > most[1] ? most[0] : most[1];
}

/* Whether any lane is above a bound. */
INLINE int any_above(vec x, float bound) {
#ifdef __AVX512F__
    return _mm512_cmp_ps_mask((__m512)x, (__m512)splat(bound), _CMP_GT_OQ) != 0;
#else
    return largest_of(x) > bound;
#endif
}
