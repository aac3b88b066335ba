/* Softmax of rows of queries over pieces of keys, and its gradient (flash attention, Dao et al. 2022).
 *
 * A tile holds the rows (queries and heads of one KV head) that one thread works on. Pieces of keys come one after
 * another; every row keeps the largest score so far and the sum of its weights. No row's result depends on the others.
 * Legend: H query heads, G KV heads, R = H / G, K head size, `depth` cells of a row (rows.h).
 */

#include "rows.h"

/* A row's weights are relative to the largest score so far, in powers of two. The largest is only raised when a score
 * exceeds it by more than this, since raising it means to scale all sums: weights up to 2^8 lose nothing in fp32. */
#define SLACK 8

typedef struct {
    int64_t token, group, groups, ratio; /* the first query, in the whole stream, and its KV head; G, R */
    int64_t size, depth;
    float scale;
    int is_bf16;
    float *cells, *slopes;                  /* (rows, depth): of the queries, and of the gradients of the output */
    float *mixed;                           /* (rows, K): weighted sums of values, or gradients of the queries */
    float *most, *totals;                   /* (rows), (rows, LANES): about the largest score, sums of the weights */
    float *logs, *dots;                     /* (rows), on the way back: log2 of the denominators, o . do */
    float *keys, *values, *pairs, *weights; /* a piece: columns of keys and of values, pairs of one, (ROWS, PIECE) */
} tile;

/* The place in (T, H) of row `row`, which is head `row` % R of query `row` / R. */
INLINE int64_t row_of(const tile *t, int64_t row) {
    return ((t->token + row / t->ratio) * t->groups + t->group) * t->ratio + row % t->ratio;
}

INLINE void scores_of(const tile *t, const float *cells, const float *columns, const int32_t *row, int rows,
                      vec scores[ROWS][VECTORS], int paired) {
    const float *cell[ROWS];
    for (int r = 0; r < rows; r++)
        cell[r] = cells + row[r] * t->depth;
    products(cell, columns, t->depth, VECTORS, rows, VECTORS, scores, paired);
}

/* `x`, but `instead` in the lanes of keys that a row does not see: it sees `from` ... `end` - 1 of a piece. */
INLINE vec where_seen(vec x, float instead, int vector, int32_t from, int32_t end) {
    vec_i32 at = PLACES + (int32_t)(vector * LANES);
    return pick((at >= from) & (at < end), x, splat(instead));
}

/* Adds a piece of keys and values to the running softmax of `rows` rows, each of which sees from ... end - 1 of it. */
INLINE void attend_rows(const tile *t, const int32_t *row, const int32_t *from, const int32_t *end, int rows,
                        int paired) {
    vec scores[ROWS][VECTORS], most[ROWS];
    int rises = 0;
    scores_of(t, t->cells, t->keys, row, rows, scores, paired);
    for (int r = 0; r < rows; r++) {
        for (int v = 0; v < VECTORS; v++)
            scores[r][v] *= t->scale * LOG2E;
        if (from[r] > 0 || end[r] < PIECE)
            for (int v = 0; v < VECTORS; v++)
                scores[r][v] = where_seen(scores[r][v], -INFINITY, v, from[r], end[r]);
        most[r] = larger(larger(scores[r][0], scores[r][1]), larger(scores[r][2], scores[r][3]));
        rises |= any_above(most[r], t->most[row[r]] + SLACK);
    }
    float *out[ROWS], share[ROWS];
    for (int r = 0; r < rows; r++) {
        out[r] = t->mixed + row[r] * t->size;
        share[r] = 1;
    }
    if (__builtin_expect(rises, 0)) {
        vec change = splat(0);
        for (int r = 0; r < rows; r++) {
            float before = t->most[row[r]], largest = largest_of(most[r]);
            if (largest > before + SLACK) {
                change[r] = before - largest;
                t->most[row[r]] = largest;
            }
        }
        change = exp2_of(change);
        for (int r = 0; r < rows; r++) {
            share[r] = change[r];
            store_f32(t->totals + row[r] * LANES, change[r] * load_f32(t->totals + row[r] * LANES));
        }
    }
    const float *weights[ROWS];
    for (int r = 0; r < rows; r++) {
        vec total = load_f32(t->totals + row[r] * LANES);
        for (int v = 0; v < VECTORS; v++) {
            scores[r][v] = exp2_of(scores[r][v] - t->most[row[r]]);
            total += scores[r][v];
        }
        store_f32(t->totals + row[r] * LANES, total);
        store_cells(t->weights + r * PIECE, scores[r], VECTORS, paired);
        weights[r] = t->weights + r * PIECE;
    }
    mix(out, share, weights, t->pairs, cells(PIECE, paired), t->size, rows, paired);
}

/* The weights p of a piece for `rows` rows, and the gradients of their scores: scale p_n (do . v_n - do . o). */
INLINE void slopes_of(const tile *t, const int32_t *row, const int32_t *from, const int32_t *end, int rows,
                      vec weights[ROWS][VECTORS], vec slopes[ROWS][VECTORS], int paired) {
    scores_of(t, t->cells, t->keys, row, rows, weights, paired);
    scores_of(t, t->slopes, t->values, row, rows, slopes, paired);
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) {
            weights[r][v] = exp2_of(weights[r][v] * (t->scale * LOG2E) - t->logs[row[r]]);
            if (from[r] > 0 || end[r] < PIECE)
                weights[r][v] = where_seen(weights[r][v], 0, v, from[r], end[r]);
            slopes[r][v] = weights[r][v] * (slopes[r][v] - t->dots[row[r]]) * t->scale;
        }
}

/* Adds the share of a piece to the gradients of `rows` query rows: dq = sum_n slope_n k_n. */
INLINE void bend_rows(const tile *t, float *const *of_query, vec slopes[ROWS][VECTORS], int rows, int paired) {
    const float *weights[ROWS], share[ROWS] = {1, 1, 1, 1};
    for (int r = 0; r < rows; r++) {
        store_cells(t->weights + r * PIECE, slopes[r], VECTORS, paired);
        weights[r] = t->weights + r * PIECE;
    }
    mix(of_query, share, weights, t->pairs, cells(PIECE, paired), t->size, rows, paired);
}

/* Lays out a piece of keys and values, and prefetches the `next`. */
INLINE void lay_piece(const tile *t, const void *const *keys, const void *const *values, const void *const *next_keys,
                      const void *const *next_values, int backward, int paired) {
    lay_columns(keys, next_keys, t->is_bf16, t->depth, VECTORS, 1, LANES, t->keys, paired);
    if (backward) {
        lay_columns(values, next_values, t->is_bf16, t->depth, VECTORS, 1, LANES, t->values, paired);
        lay_pairs(keys, keys, t->is_bf16, PIECE, t->size, t->pairs, paired);
    } else
        lay_pairs(values, next_values, t->is_bf16, PIECE, t->size, t->pairs, paired);
}

/* Lays out the first `rows` rows of a tile's queries. */
INLINE void begin_rows(const tile *t, const void *query, int64_t rows, int paired) {
    for (int64_t row = 0; row < rows; row++) {
        const void *from = array_at((array){query, t->is_bf16}, row_of(t, row) * t->size);
        lay_row(from, t->is_bf16, t->depth, t->cells + row * t->depth, paired);
        t->most[row] = -INFINITY;
        store_f32(t->totals + row * LANES, splat(0));
        memset(t->mixed + row * t->size, 0, t->size * sizeof *t->mixed);
    }
}

/* Lays out what the way back reads of these rows beside the queries: do, o . do, and the log-sum-exps `sums` (T, H). */
INLINE void begin_slopes(const tile *t, const void *output, const void *slope, const float *sums, int64_t rows,
                         int paired) {
    array of_output = {slope, t->is_bf16}, outputs = {output, t->is_bf16};
    for (int64_t row = 0; row < rows; row++) {
        int64_t at = row_of(t, row);
        lay_row(array_at(of_output, at * t->size), t->is_bf16, t->depth, t->slopes + row * t->depth, paired);
        vec dot = splat(0);
        for (int64_t k = 0; k < t->size; k += LANES)
            dot += load(of_output, at * t->size + k) * load(outputs, at * t->size + k);
        t->dots[row] = sum(dot);
        t->logs[row] = sums[at] * LOG2E;
    }
}

/* Writes the outputs and log-sum-exps of a tile's first `rows` rows. */
INLINE void finish_rows(const tile *t, void *output, float *sums, int64_t rows) {
    for (int64_t row = 0; row < rows; row++) {
        int64_t at = row_of(t, row);
        float total = sum(load_f32(t->totals + row * LANES));
        for (int64_t k = 0; k < t->size; k += LANES)
            put_vec(output, t->is_bf16, at * t->size + k, load_f32(t->mixed + row * t->size + k) / total);
        sums[at] = (t->most[row] + log2f(total)) / LOG2E;
    }
}

/* Cuts memory into the arrays of a tile of so many rows. */
INLINE void furnish_tile(tile *t, room *left, int64_t rows, int backward) {
    t->cells = cut(left, rows * t->depth);
    t->mixed = cut(left, rows * t->size);
    t->most = cut(left, rows);
    t->totals = cut(left, rows * LANES);
    t->keys = cut(left, PIECE * t->depth);
    t->pairs = cut(left, PIECE * t->size);
    t->weights = cut(left, ROWS * PIECE);
    if (!backward)
        return;
    t->slopes = cut(left, rows * t->depth);
    t->values = cut(left, PIECE * t->depth);
    t->logs = cut(left, rows);
    t->dots = cut(left, rows);
}
