/* y = x W^T + b for few rows: every row of W is read once, from memory, for all rows of x.
 *
 * W is of the type of x, or int8 with a scale for each output.
 * The order in which an entry of y is summed does not depend on the number of rows, so a row gives the same result
 * alone and among others.
 * Legend: T rows, D inputs (a multiple of CHUNK), E outputs (a multiple of OUTPUTS).
 */

#include "../compiled/vectors.h"

#define OUTPUTS 4  /* rows of W that share what is loaded of x */
#define TOGETHER 6 /* rows of x that share a load of W */
#define AHEAD 32768 /* bytes by which W is fetched ahead of its use, into the second cache: into the first is no gain */

typedef int8_t vec_i8 __attribute__((vector_size(16)));

INLINE vec load_i8(const char *from) {
#ifdef __AVX512F__ /* for which GCC makes a loop over the lanes of the general form */
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#endif
    vec_i8 bytes;
    memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(bytes, vec);
}

/* Adds the products of a chunk of W in int8, whose numbers are widened once for all rows: to bf16, which holds them
 * exactly, where x is of bf16 and the machine multiplies it, and else to fp32. */
INLINE void add_widened(vec parts[TOGETHER][OUTPUTS], array x, array weight, int rows, int64_t output, int64_t inputs,
                        int64_t d) {
#ifdef __AVX512BF16__
    if (x.is_bf16) {
        __m512bh wide[OUTPUTS];
        for (int o = 0; o < OUTPUTS; o++) {
            const char *entries = weight.data + (output + o) * inputs + d;
            wide[o] = _mm512_cvtne2ps_pbh((__m512)load_i8(entries + LANES), (__m512)load_i8(entries));
        }
        for (int r = 0; r < rows; r++)
            for (int o = 0; o < OUTPUTS; o++) {
                __m512bh row = (__m512bh)_mm512_loadu_si512(x.data + 2 * (r * inputs + d));
                parts[r][o] = (vec)_mm512_dpbf16_ps((__m512)parts[r][o], wide[o], row);
            }
        return;
    }
#endif
    for (int64_t at = d; at < d + CHUNK; at += LANES) {
        vec wide[OUTPUTS];
        for (int o = 0; o < OUTPUTS; o++)
            wide[o] = load_i8(weight.data + (output + o) * inputs + at);
        for (int r = 0; r < rows; r++)
            for (int o = 0; o < OUTPUTS; o++)
                parts[r][o] += wide[o] * load(x, r * inputs + at);
    }
}

/* sums[r][o] = the product of row r of x with row output + o of W, for `rows` rows of x. */
INLINE void block(array x, array weight, int is_int8, int rows, int64_t output, int64_t inputs,
                  float sums[TOGETHER][OUTPUTS]) {
    vec parts[TOGETHER][OUTPUTS];
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < OUTPUTS; o++)
            parts[r][o] = splat(0);
    for (int64_t d = 0; d < inputs; d += CHUNK) {
        for (int o = 0; o < OUTPUTS; o++) {
            int64_t at = (output + o) * inputs + d;
            __builtin_prefetch(weight.data + at * (is_int8 ? 1 : weight.is_bf16 ? 2 : 4) + AHEAD, 0, 2);
        }
        if (is_int8)
            add_widened(parts, x, weight, rows, output, inputs, d);
        else
            for (int r = 0; r < rows; r++)
                for (int o = 0; o < OUTPUTS; o++)
                    parts[r][o] = add_products(parts[r][o], weight, (output + o) * inputs + d, x, r * inputs + d);
    }
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < OUTPUTS; o++)
            sums[r][o] = sum(parts[r][o]);
}

/* block, with the number of rows as a constant, so that sums stay in registers. */
INLINE void block_of(array x, array weight, int is_int8, int64_t rows, int64_t output, int64_t inputs,
                     float sums[TOGETHER][OUTPUTS]) {
    switch (rows) {
    case 1: block(x, weight, is_int8, 1, output, inputs, sums); break;
    case 2: block(x, weight, is_int8, 2, output, inputs, sums); break;
    case 3: block(x, weight, is_int8, 3, output, inputs, sums); break;
    case 4: block(x, weight, is_int8, 4, output, inputs, sums); break;
    case 5: block(x, weight, is_int8, 5, output, inputs, sums); break;
    default: block(x, weight, is_int8, TOGETHER, output, inputs, sums);
    }
}

/* x (T, D), weight (E, D), bias (E) or null and y (T, E), all of bf16 or all of fp32. */
void longwave_linear(const void *x, const void *weight, const void *bias, void *y, int is_bf16, int64_t rows,
                     int64_t inputs, int64_t outputs, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * inputs * outputs >= WORTH_THREADS)
    for (int64_t output = 0; output < outputs; output += OUTPUTS)
        for (int64_t row = 0; row < rows; row += TOGETHER) {
            int64_t count = rows - row < TOGETHER ? rows - row : TOGETHER;
            float sums[TOGETHER][OUTPUTS];
            if (is_bf16)
                block_of(from((array){x, 1}, row * inputs), (array){weight, 1}, 0, count, output, inputs, sums);
            else
                block_of(from((array){x, 0}, row * inputs), (array){weight, 0}, 0, count, output, inputs, sums);
            for (int64_t r = 0; r < count; r++)
                for (int o = 0; o < OUTPUTS; o++) {
                    float shift = bias ? number((array){bias, is_bf16}, output + o) : 0.0f;
                    put(y, is_bf16, (row + r) * outputs + output + o, sums[r][o] + shift);
                }
        }
}

/* weight (E, D) of int8, scale (E) and bias (E) or null of fp32, x (T, D) and y (T, E) both of bf16 or of fp32. */
void longwave_linear_int8(const void *x, const void *weight, const float *scale, const float *bias, void *y,
                          int is_bf16, int64_t rows, int64_t inputs, int64_t outputs, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * inputs * outputs >= WORTH_THREADS)
    for (int64_t output = 0; output < outputs; output += OUTPUTS)
        for (int64_t row = 0; row < rows; row += TOGETHER) {
            int64_t count = rows - row < TOGETHER ? rows - row : TOGETHER;
            float sums[TOGETHER][OUTPUTS];
            if (is_bf16)
                block_of(from((array){x, 1}, row * inputs), (array){weight, 0}, 1, count, output, inputs, sums);
            else
                block_of(from((array){x, 0}, row * inputs), (array){weight, 0}, 1, count, output, inputs, sums);
            for (int64_t r = 0; r < count; r++)
                for (int o = 0; o < OUTPUTS; o++)
                    put(y, is_bf16, (row + r) * outputs + output + o,
                        sums[r][o] * scale[output + o] + (bias ? bias[output + o] : 0.0f));
        }
}
