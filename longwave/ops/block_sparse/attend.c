/* Attention of queries to their blocks of keys, and the gradient of the queries (flash attention, Dao et al. 2022).
 *
 * The queries of a tile are neighbours and see many of the same blocks. A tile walks through all blocks that any of its
 * queries sees, so that a piece of keys is laid out once for all of them; every head of a query keeps its own running
 * softmax. A query's result does not depend on the other queries of its tile.
 * Legend: T queries and N keys, H query heads, G KV heads, R = H / G, K head size.
 */

#include "attend.h"

#define TOGETHER 128 /* rows of a tile, about */

/* One thread's tile: the queries start ... start + count - 1 of a group, and the arrays of its intermediate results. */
typedef struct {
    int64_t group, start, count, depth;
    float *cells, *slopes;                  /* (count R, depth) of the queries, and of the gradients of the output */
    float *mixed;                           /* (count R, K): weighted sums of values, or gradients of the queries */
    float *most, *totals;                   /* (count R), (count R, LANES): largest score, sums of the weights */
    float *keys, *values, *pairs, *weights; /* a piece: columns of keys and of values, pairs of one, (ROWS, PIECE) */
    int32_t *cursors, *rows, *seen; /* each query's place in its list; rows that see a piece, and how many keys of it */
} tile;

INLINE void scores_of(const tile *t, const float *cells, const float *columns, const int32_t *row, int rows,
                      vec scores[ROWS][VECTORS], int paired) {
    const float *cell[ROWS];
    for (int r = 0; r < rows; r++)
        cell[r] = cells + row[r] * t->depth;
    products(cell, columns, t->depth, VECTORS, rows, VECTORS, scores, paired);
}

/* The mask of the keys (lanes) that a row does not see. */
INLINE vec_i32 hidden(int vector, int32_t seen) { return PLACES + (int32_t)(vector * LANES) >= seen; }

/* Adds a piece of keys and values to the running softmax of `rows` rows. */
INLINE void attend_rows(const task *a, const tile *t, const int32_t *row, const int32_t *seen, int rows, int paired) {
    vec scores[ROWS][VECTORS], change = splat(0);
    scores_of(t, t->cells, t->keys, row, rows, scores, paired);
    for (int r = 0; r < rows; r++) {
        vec most = splat(t->most[row[r]]);
        for (int v = 0; v < VECTORS; v++) {
            scores[r][v] *= a->scale * LOG2E;
            if (seen[r] < PIECE)
                scores[r][v] = pick(hidden(v, seen[r]), splat(-INFINITY), scores[r][v]);
            most = larger(most, scores[r][v]);
        }
        float largest = largest_of(most);
        change[r] = t->most[row[r]] - largest;
        t->most[row[r]] = largest;
    }
    change = exp2_of(change);
    float *out[ROWS], share[ROWS];
    const float *weights[ROWS];
    for (int r = 0; r < rows; r++) {
        share[r] = change[r];
        vec total = share[r] * load_f32(t->totals + row[r] * LANES);
        for (int v = 0; v < VECTORS; v++) {
            scores[r][v] = exp2_of(scores[r][v] - t->most[row[r]]);
            total += scores[r][v];
        }
        store_f32(t->totals + row[r] * LANES, total);
        store_cells(t->weights + r * PIECE, scores[r], VECTORS, paired);
        weights[r] = t->weights + r * PIECE;
        out[r] = t->mixed + row[r] * a->size;
    }
    mix(out, share, weights, t->pairs, cells(PIECE, paired), a->size, rows, paired);
}

/* Adds the share of a piece to the gradients of `rows` query rows: dq = scale sum_n p_n (do . v_n - do . o) k_n. */
INLINE void bend_rows(const task *a, const tile *t, const int32_t *row, const int32_t *seen, int rows, int paired) {
    vec scores[ROWS][VECTORS], slopes[ROWS][VECTORS];
    scores_of(t, t->cells, t->keys, row, rows, scores, paired);
    scores_of(t, t->slopes, t->values, row, rows, slopes, paired);
    float *out[ROWS], share[ROWS];
    const float *weights[ROWS];
    for (int r = 0; r < rows; r++) {
        int64_t at = row_of(a, t->group, t->start, row[r]);
        for (int v = 0; v < VECTORS; v++) {
            vec weight = exp2_of(scores[r][v] * (a->scale * LOG2E) - a->sums[at] * LOG2E);
            slopes[r][v] = weight * (slopes[r][v] - a->dots[at]) * a->scale;
            slopes[r][v] = pick(hidden(v, seen[r]), splat(0), slopes[r][v]);
        }
        store_cells(t->weights + r * PIECE, slopes[r], VECTORS, paired);
        share[r] = 1;
        weights[r] = t->weights + r * PIECE;
        out[r] = t->mixed + row[r] * a->size;
    }
    mix(out, share, weights, t->pairs, cells(PIECE, paired), a->size, rows, paired);
}

/* Lays out the keys from ... end - 1, at most PIECE, and prefetches as many from `next` on. */
INLINE void lay_piece(const task *a, const tile *t, int64_t from, int64_t end, int64_t next, int backward, int paired) {
    const void *keys[PIECE], *values[PIECE], *next_keys[PIECE], *next_values[PIECE];
    find_rows(a->keys, a->is_bf16, a->key_group, a->key_token, t->group, from, end, keys);
    find_rows(a->values, a->is_bf16, a->value_group, a->value_token, t->group, from, end, values);
    find_rows(a->keys, a->is_bf16, a->key_group, a->key_token, t->group, next, a->keys_count, next_keys);
    find_rows(a->values, a->is_bf16, a->value_group, a->value_token, t->group, next, a->keys_count, next_values);
    lay_columns(keys, next_keys, a->is_bf16, t->depth, VECTORS, 1, LANES, t->keys, paired);
    if (backward) {
        lay_columns(values, next_values, a->is_bf16, t->depth, VECTORS, 1, LANES, t->values, paired);
        lay_pairs(keys, keys, a->is_bf16, PIECE, a->size, t->pairs, paired);
    } else
        lay_pairs(values, next_values, a->is_bf16, PIECE, a->size, t->pairs, paired);
}

/* The next block of a query's list; INT64_MAX behind its last. */
INLINE int64_t at_cursor(const task *a, const tile *t, int64_t query) {
    const int32_t *list = a->blocks + (t->group * a->tokens + t->start + query) * a->topk;
    int32_t block = t->cursors[query] < a->topk ? list[t->cursors[query]] : -1;
    return block < 0 ? INT64_MAX : block;
}

/* The next block that any query of the tile sees, which is only looked at; `none` behind the last. */
INLINE int64_t coming(const task *a, const tile *t, int64_t none) {
    int64_t block = INT64_MAX;
    for (int64_t q = 0; q < t->count; q++)
        block = at_cursor(a, t, q) < block ? at_cursor(a, t, q) : block;
    return block == INT64_MAX ? none : block;
}

/* Takes the next block that any query of the tile sees -> its number, and the queries that see it. */
INLINE int64_t next_block(const task *a, tile *t, int64_t *queries, int64_t *count) {
    int64_t block = INT64_MAX;
    *count = 0;
    for (int64_t q = 0; q < t->count; q++) {
        int64_t own = at_cursor(a, t, q);
        if (own == INT64_MAX || own > block)
            continue;
        if (own < block)
            *count = 0;
        block = own;
        queries[(*count)++] = q;
    }
    for (int64_t i = 0; i < *count; i++)
        t->cursors[queries[i]]++;
    return block;
}

/* Fills `rows` with the rows of these queries that see keys in from ... end - 1 of a block -> the number of rows. */
INLINE int64_t rows_that_see(const task *a, tile *t, const int64_t *queries, int64_t count, int64_t from, int64_t end) {
    int64_t rows = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t last = a->first + t->start + queries[i] + 1, seen = (last < end ? last : end) - from;
        for (int64_t head = 0; head < a->ratio && seen > 0; head++) {
            t->rows[rows] = (int32_t)(queries[i] * a->ratio + head);
            t->seen[rows++] = (int32_t)(seen < PIECE ? seen : PIECE);
        }
    }
    return rows;
}

/* Processes every block that the tile's queries see, a piece of keys at a time. */
INLINE void walk(const task *a, tile *t, int backward, int paired) {
    int64_t queries[t->count], count, block;
    memset(t->cursors, 0, t->count * sizeof *t->cursors);
    while ((block = next_block(a, t, queries, &count)) != INT64_MAX) {
        int64_t start = block * a->block_size, end = start + a->block_size;
        int64_t after = coming(a, t, block) * a->block_size;
        for (int64_t from = start; from < end; from += PIECE) {
            int64_t rows = rows_that_see(a, t, queries, count, from, end), last = a->first + t->start + t->count;
            if (!rows)
                break;
            int64_t next = from + PIECE < end ? from + PIECE : after;
            lay_piece(a, t, from, end < last ? end : last, next, backward, paired);
            for (int64_t i = 0; i < rows; i += rows - i >= ROWS ? ROWS : 1) {
                const int32_t *row = t->rows + i, *seen = t->seen + i;
                if (backward && rows - i >= ROWS)
                    bend_rows(a, t, row, seen, ROWS, paired);
                else if (backward)
                    bend_rows(a, t, row, seen, 1, paired);
                else if (rows - i >= ROWS)
                    attend_rows(a, t, row, seen, ROWS, paired);
                else
                    attend_rows(a, t, row, seen, 1, paired);
            }
        }
    }
}

/* Lays out the queries of a tile; for the backward pass also the gradients of the outputs, and the dots o . do. */
INLINE void begin(const task *a, tile *t, int backward, int paired) {
    array query = {a->query, a->is_bf16}, slope = {a->slope, a->is_bf16}, output = {a->output, a->is_bf16};
    for (int64_t row = 0; row < t->count * a->ratio; row++) {
        int64_t at = row_of(a, t->group, t->start, row);
        lay_row(array_at(query, at * a->size), a->is_bf16, t->depth, t->cells + row * t->depth, paired);
        t->most[row] = -INFINITY;
        store_f32(t->totals + row * LANES, splat(0));
        memset(t->mixed + row * a->size, 0, a->size * sizeof *t->mixed);
        if (!backward)
            continue;
        lay_row(array_at(slope, at * a->size), a->is_bf16, t->depth, t->slopes + row * t->depth, paired);
        vec dot = splat(0);
        for (int64_t k = 0; k < a->size; k += LANES)
            dot += load(slope, at * a->size + k) * load(output, at * a->size + k);
        a->dots[at] = sum(dot);
    }
}

/* Writes a tile's outputs and log-sum-exp, or the gradients of its queries. */
INLINE void finish(const task *a, const tile *t, int backward) {
    for (int64_t row = 0; row < t->count * a->ratio; row++) {
        int64_t at = row_of(a, t->group, t->start, row);
        float total = backward ? 1 : sum(load_f32(t->totals + row * LANES));
        for (int64_t k = 0; k < a->size; k++)
            put(backward ? a->of_query : a->output, a->is_bf16, at * a->size + k, t->mixed[row * a->size + k] / total);
        if (!backward)
            a->sums[at] = (t->most[row] + log2f(total)) / LOG2E;
    }
}

INLINE void attend_of_tile(const task *a, tile *t, int backward, int paired) {
    begin(a, t, backward, paired);
    walk(a, t, backward, paired);
    finish(a, t, backward);
}

static void forward_paired(const task *a, tile *t) { attend_of_tile(a, t, 0, PAIRED(1)); }
static void forward_single(const task *a, tile *t) { attend_of_tile(a, t, 0, 0); }
static void backward_paired(const task *a, tile *t) { attend_of_tile(a, t, 1, PAIRED(1)); }
static void backward_single(const task *a, tile *t) { attend_of_tile(a, t, 1, 0); }

/* Cuts a thread's memory into the arrays of a tile; returns the number of floats that they take. */
static int64_t furnish(const task *a, tile *t, int64_t queries, float *base) {
    room left = {base, 0};
    int64_t rows = queries * a->ratio;
    t->cells = cut(&left, rows * t->depth);
    t->slopes = cut(&left, rows * t->depth);
    t->mixed = cut(&left, rows * a->size);
    t->most = cut(&left, rows);
    t->totals = cut(&left, rows * LANES);
    t->keys = cut(&left, PIECE * t->depth);
    t->values = cut(&left, PIECE * t->depth);
    t->pairs = cut(&left, PIECE * a->size);
    t->weights = cut(&left, ROWS * PIECE);
    t->cursors = (int32_t *)cut(&left, queries);
    t->rows = (int32_t *)cut(&left, rows);
    t->seen = (int32_t *)cut(&left, rows);
    return left.used;
}

static int run(const task *a, void (*of_tile)(const task *, tile *)) {
    int64_t queries = TOGETHER / a->ratio > 0 ? TOGETHER / a->ratio : 1, failed = 0;
    queries = queries < a->tokens ? queries : a->tokens;
    int64_t tiles = (a->tokens + queries - 1) / queries;
    int64_t work = a->tokens * a->groups * a->ratio * a->size * a->topk * a->block_size;
    tile shape = {.depth = cells(a->size, PAIRED(a->is_bf16))};
#pragma omp parallel num_threads(a->threads) if (work >= WORTH_THREADS)
    {
        tile t = shape;
        float *floats = aligned_alloc(64, furnish(a, &t, queries, NULL) * sizeof *floats);
        if (!floats)
#pragma omp atomic write
            failed = 1;
        else
            furnish(a, &t, queries, floats);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t g = 0; g < a->groups; g++)
            for (int64_t i = 0; i < tiles; i++) {
                if (!floats)
                    continue;
                t.group = g;
                t.start = i * queries;
                t.count = a->tokens - t.start < queries ? a->tokens - t.start : queries;
                of_tile(a, &t);
            }
        free(floats);
    }
    return (int)failed;
}

/* Fills `output` and `sums`; returns 1 if there is no memory. */
int longwave_attend(const task *a) { return run(a, PAIRED(a->is_bf16) ? forward_paired : forward_single); }

/* Fills `of_query` and `dots` from `output`, `sums` and `slope`; returns 1 if there is no memory. */
int longwave_attend_queries(const task *a) { return run(a, PAIRED(a->is_bf16) ? backward_paired : backward_single); }
