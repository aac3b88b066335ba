/* Sixteen floats at a time, in the vector extension that GCC and Clang share; the compiler maps it to the machine. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define LANES 16
#define WORTH_THREADS 65536 /* products below which waking other threads takes longer than they save */
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

/* What begins `at` entries further on. */
INLINE array from(array a, int64_t at) { return (array){a.data + at * (a.is_bf16 ? 2 : 4), a.is_bf16}; }

INLINE vec larger(vec a, vec b) {
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

/* Puts a number in its place, rounded to the nearest bf16 (to even in a tie) where the array holds those. */
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

INLINE float sum(vec x) {
    half_vec parts[2];
    memcpy(parts, &x, sizeof parts);
    half_vec eight = parts[0] + parts[1];
    quarter_vec fours[2];
    memcpy(fours, &eight, sizeof fours);
    quarter_vec four = fours[0] + fours[1];
    return (four[0] + four[1]) + (four[2] + four[3]);
}

/* e^x for x <= 0, to 2e-7 relative: e^x = 2^n 2^f with |f| <= 1/2, and the Taylor polynomial of 2^f; below -87 it is 0. */
INLINE vec exp_negative(vec x) {
    vec scaled = x * 1.44269504088896341f;
    vec_i32 under = scaled < -126.0f;
    scaled = (vec)(((vec_i32)scaled & ~under) | ((vec_i32)splat(-126.0f) & under));
    vec_i32 n = __builtin_convertvector(scaled - 0.5f, vec_i32); /* towards zero, so to nearest for what is negative */
    vec f = (scaled - __builtin_convertvector(n, vec)) * 0.693147180559945309f;
    vec p = splat(1.0f / 5040);
    p = p * f + 1.0f / 720;
    p = p * f + 1.0f / 120;
    p = p * f + 1.0f / 24;
    p = p * f + 1.0f / 6;
    p = p * f + 0.5f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    vec_i32 power = (n + 127) << 23;
    return (vec)((vec_i32)(p * (vec)power) & ~under);
}
