/* Small matrix products: a few rows of queries against PIECE keys, laid out so that inner loops only multiply.
 *
 * A cell is the operand of one lane: a pair of bf16 numbers where the processor multiplies pairs (`paired`), otherwise
 * one fp32 number. Sums are in fp32, and the order of a row's sums does not depend on the rows beside it.
 * Legend: K entries of a row (a multiple of CHUNK), `depth` cells of it.
 */

#include <stdlib.h>

#include "vectors.h"

#define PIECE 64                /* keys that are laid out and scored together */
#define VECTORS (PIECE / LANES) /* vectors of a row whose sums stay in registers */
#define ROWS 4                  /* rows whose sums stay in registers */

#ifdef __AVX512BF16__
#define PAIRED(is_bf16) (is_bf16)
#else
#define PAIRED(is_bf16) 0
#endif

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define SHUFFLE16(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vec_i32){__VA_ARGS__})
#define SHUFFLE16(a, b, ...) __builtin_shuffle(a, b, (vec_i16){__VA_ARGS__})
#endif

typedef int16_t vec_i16 __attribute__((vector_size(64)));

static const vec_i32 PLACES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
static const float ZEROS[256]; /* a row of zeros, which stands for a missing row; heads have at most 256 entries */

INLINE vec pick(vec_i32 where, vec a, vec b) { return (vec)(((vec_i32)a & where) | ((vec_i32)b & ~where)); }

/* The address of entry `at` of an array. */
INLINE const void *array_at(array a, int64_t at) { return from(a, at).data; }

INLINE int64_t cells(int64_t entries, int paired) { return paired ? entries / 2 : entries; }

INLINE vec splat_cell(const float *cell) {
    int32_t bits;
    memcpy(&bits, cell, sizeof bits);
    return (vec)((vec_i32){0} + bits);
}

INLINE vec multiply_add(vec sums, vec a, vec b, int paired) {
#ifdef __AVX512BF16__
    if (paired)
        return (vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#endif
    return sums + a * b;
}

/* Sixteen cells of a row of numbers, from cell `at` on. */
INLINE vec load_cells(const void *row, int is_bf16, int64_t at, int paired) {
    return paired ? load_f32((const float *)row + at) : load((array){row, is_bf16}, at);
}

/* Turns 32 or 64 numbers into cells. */
INLINE void store_cells(float *to, const vec *from, int vectors, int paired) {
    for (int v = 0; v < vectors; v++) {
#ifdef __AVX512BF16__
        if (paired) {
            __m256bh half = _mm512_cvtneps_pbh((__m512)from[v]);
            memcpy((char *)to + v * sizeof half, &half, sizeof half);
            continue;
        }
#endif
        store_f32(to + v * LANES, from[v]);
    }
}

#define EXCHANGE(step, low, high)              \
    for (int i = 0; i < LANES; i++)            \
        if (!(i & step)) {                     \
            vec_i32 a = x[i], b = x[i + step]; \
            x[i] = low;                        \
            x[i + step] = high;                \
        }

/* Transposes sixteen rows of sixteen cells: blocks of 1, 2, 4 and 8 cells change places across the diagonal. */
INLINE void transpose(vec_i32 *x) {
    EXCHANGE(1, SHUFFLE(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
             SHUFFLE(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
    EXCHANGE(2, SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
             SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
    EXCHANGE(4, SHUFFLE(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
             SHUFFLE(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
    EXCHANGE(8, SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
             SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
}

/* LANES * vectors rows -> columns (depth, vectors, LANES): lane l of vector v is row l * lane_step + v * vector_step.
 * Meanwhile as many rows from `next` are prefetched. */
INLINE void lay_columns(const void *const *rows, const void *const *next, int is_bf16, int64_t depth, int64_t vectors, int64_t lane_step,
                        int64_t vector_step, float *columns, int paired) {
    for (int64_t v = 0; v < vectors; v++)
        for (int64_t d = 0; d < depth; d += LANES) {
            vec_i32 x[LANES];
            for (int l = 0; l < LANES; l++) {
                int64_t row = l * lane_step + v * vector_step;
                x[l] = (vec_i32)load_cells(rows[row], is_bf16, d, paired);
                prefetch((array){next[row], is_bf16}, paired ? 2 * d : d, 0);
            }
            transpose(x);
            for (int i = 0; i < LANES; i++)
                store_f32(columns + ((d + i) * vectors + v) * LANES, (vec)x[i]);
        }
}

/* Interleaves CHUNK numbers of two rows of bf16. */
INLINE void interleave(const void *one, const void *other, int64_t at, float *out) {
    vec_i16 a, b, low, high;
    memcpy(&a, (const int16_t *)one + at, sizeof a);
    memcpy(&b, (const int16_t *)other + at, sizeof b);
    low = SHUFFLE16(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44,
                    13, 45, 14, 46, 15, 47);
    high = SHUFFLE16(a, b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27,
                     59, 28, 60, 29, 61, 30, 62, 31, 63);
    memcpy(out, &low, sizeof low);
    memcpy(out + LANES, &high, sizeof high);
}

/* An even number `count` of rows of K entries -> (cells of count, K): cell p holds entry k of row p or, paired, of the
 * rows 2 p and 2 p + 1. Meanwhile the `next` rows are prefetched. */
INLINE void lay_pairs(const void *const *rows, const void *const *next, int is_bf16, int64_t count, int64_t size, float *out, int paired) {
    for (int64_t p = 0; p < cells(count, paired); p++)
        for (int64_t k = 0; k < size; k += CHUNK) {
            float *to = out + p * size + k;
            prefetch((array){next[paired ? 2 * p : p], is_bf16}, k, 0);
            if (paired) {
                prefetch((array){next[2 * p + 1], 1}, k, 0);
                interleave(rows[2 * p], rows[2 * p + 1], k, to);
                continue;
            }
            store_f32(to, load((array){rows[p], is_bf16}, k));
            store_f32(to + LANES, load((array){rows[p], is_bf16}, k + LANES));
        }
}

/* Copies a row to `out` as cells. */
INLINE void lay_row(const void *row, int is_bf16, int64_t depth, float *out, int paired) {
    for (int64_t d = 0; d < depth; d += LANES)
        store_f32(out + d, load_cells(row, is_bf16, d, paired));
}

/* sums[r][v] = the products of row r with column vector v, for `vectors` of the `width` vectors of columns. */
INLINE void products(const float *const *row, const float *columns, int64_t depth, int64_t width, int rows, int vectors,
                     vec sums[ROWS][VECTORS], int paired) {
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            sums[r][v] = splat(0);
    for (int64_t d = 0; d < depth; d++) {
        vec column[VECTORS];
        for (int v = 0; v < vectors; v++)
            column[v] = load_f32(columns + (d * width + v) * LANES);
        for (int r = 0; r < rows; r++) {
            vec cell = splat_cell(row[r] + d);
            for (int v = 0; v < vectors; v++)
                sums[r][v] = multiply_add(sums[r][v], cell, column[v], paired);
        }
    }
}

/* out[r] = share[r] out[r] + the weights' cells of row r times the pairs (count cells, K), for `vectors` vectors. */
INLINE void mix_some(float *const *out, const float *share, const float *const *weights, const float *pairs,
                     int64_t count, int64_t size, int rows, int vectors, int paired) {
    vec sums[ROWS][VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            sums[r][v] = share[r] * load_f32(out[r] + v * LANES);
    for (int64_t n = 0; n < count; n++) {
        vec entry[VECTORS];
        for (int v = 0; v < vectors; v++)
            entry[v] = load_f32(pairs + n * size + v * LANES);
        for (int r = 0; r < rows; r++) {
            vec weight = splat_cell(weights[r] + n);
            for (int v = 0; v < vectors; v++)
                sums[r][v] = multiply_add(sums[r][v], weight, entry[v], paired);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            store_f32(out[r] + v * LANES, sums[r][v]);
}

/* mix_some for all K entries. */
INLINE void mix(float *const *out, const float *share, const float *const *weights, const float *pairs, int64_t count,
                int64_t size, int rows, int paired) {
    for (int64_t k = 0; k < size; k += VECTORS * LANES) {
        float *from[ROWS];
        for (int r = 0; r < rows; r++)
            from[r] = out[r] + k;
        if (size - k >= VECTORS * LANES)
            mix_some(from, share, weights, pairs + k, count, size, rows, VECTORS, paired);
        else
            mix_some(from, share, weights, pairs + k, count, size, rows, CHUNK / LANES, paired);
    }
}

/* Memory that is cut into aligned arrays; without a base, cutting only counts the floats that they take. */
typedef struct {
    float *base;
    int64_t used;
} room;

INLINE int64_t rounded(int64_t floats) { return (floats + LANES - 1) / LANES * LANES; }

INLINE float *cut(room *from, int64_t floats) {
    float *piece = from->base ? from->base + from->used : NULL;
    from->used += rounded(floats);
    return piece;
}
