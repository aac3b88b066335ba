/* Attention of queries to their blocks of keys, and the gradient of the queries (flash attention, Dao et al. 2022).
 *
 * The queries of a tile are neighbours and see many of the same blocks. A tile walks through all blocks that any of its
 * queries sees, so that a piece of keys is laid out once for all of them; every head of a query keeps its own running
 * softmax. A query's result does not depend on the other queries of its tile.
 * Legend: T queries and N keys, H query heads, G KV heads, R = H / G, K head size.
 */

#include "attend.h"

#define TOGETHER 128 /* rows of a tile, about */

/* One thread's walk through the blocks of the queries start ... start + count - 1 of a group. */
typedef struct {
    tile rows;
    int64_t start, count;
    int32_t *cursors;          /* each query's place in its list */
    int32_t *row, *from, *end; /* the rows that see a piece, and which keys of it */
} walk;

/* Adds the share of a piece to the gradients of `rows` query rows. */
INLINE void bend_of_rows(const tile *t, const int32_t *row, const int32_t *from, const int32_t *end, int rows,
                         int paired) {
    vec weights[ROWS][VECTORS], slopes[ROWS][VECTORS];
    float *out[ROWS];
    slopes_of(t, row, from, end, rows, weights, slopes, paired);
    for (int r = 0; r < rows; r++)
        out[r] = t->mixed + row[r] * t->size;
    bend_rows(t, out, slopes, rows, paired);
}

/* Lays out the keys from ... end - 1, at most PIECE, and prefetches as many from `next` on. */
INLINE void lay_keys(const task *a, const tile *t, int64_t from, int64_t end, int64_t next, int backward, int paired) {
    const void *keys[PIECE], *values[PIECE], *next_keys[PIECE], *next_values[PIECE];
    find_rows(a->keys, a->is_bf16, a->key_group, a->key_token, t->group, from, end, keys);
    find_rows(a->values, a->is_bf16, a->value_group, a->value_token, t->group, from, end, values);
    find_rows(a->keys, a->is_bf16, a->key_group, a->key_token, t->group, next, a->keys_count, next_keys);
    find_rows(a->values, a->is_bf16, a->value_group, a->value_token, t->group, next, a->keys_count, next_values);
    lay_piece(t, keys, values, next_keys, next_values, backward, paired);
}

/* The next block of a query's list; INT64_MAX behind its last. */
INLINE int64_t at_cursor(const task *a, const walk *t, int64_t query) {
    const int32_t *list = a->blocks + (t->rows.group * a->tokens + t->start + query) * a->topk;
    int32_t block = t->cursors[query] < a->topk ? list[t->cursors[query]] : -1;
    return block < 0 ? INT64_MAX : block;
}

/* The next block that any query of the walk sees, which is only looked at; `none` behind the last. */
INLINE int64_t coming(const task *a, const walk *t, int64_t none) {
    int64_t block = INT64_MAX;
    for (int64_t q = 0; q < t->count; q++)
        block = at_cursor(a, t, q) < block ? at_cursor(a, t, q) : block;
    return block == INT64_MAX ? none : block;
}

/* Takes the next block that any query of the walk sees -> its number, and the queries that see it. */
INLINE int64_t next_block(const task *a, walk *t, int64_t *queries, int64_t *count) {
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

/* Lists the rows of these queries that see keys in from ... end - 1 of a block -> the number of rows. */
INLINE int64_t rows_that_see(const task *a, walk *t, const int64_t *queries, int64_t count, int64_t from, int64_t end) {
    int64_t rows = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t last = a->first + t->start + queries[i] + 1, seen = (last < end ? last : end) - from;
        for (int64_t head = 0; head < a->ratio && seen > 0; head++) {
            t->row[rows] = (int32_t)(queries[i] * a->ratio + head);
            t->from[rows] = 0;
            t->end[rows++] = (int32_t)(seen < PIECE ? seen : PIECE);
        }
    }
    return rows;
}

/* Processes every block that the queries see, a piece of keys at a time. */
INLINE void walk_through(const task *a, walk *t, int backward, int paired) {
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
            lay_keys(a, &t->rows, from, end < last ? end : last, next, backward, paired);
            for (int64_t i = 0; i < rows; i += rows - i >= ROWS ? ROWS : 1) {
                const int32_t *row = t->row + i, *first = t->from + i, *behind = t->end + i;
                if (backward && rows - i >= ROWS)
                    bend_of_rows(&t->rows, row, first, behind, ROWS, paired);
                else if (backward)
                    bend_of_rows(&t->rows, row, first, behind, 1, paired);
                else if (rows - i >= ROWS)
                    attend_rows(&t->rows, row, first, behind, ROWS, paired);
                else
                    attend_rows(&t->rows, row, first, behind, 1, paired);
            }
        }
    }
}

INLINE void forward(const task *a, walk *t, int paired) {
    int64_t rows = t->count * a->ratio;
    begin_rows(&t->rows, a->query, rows, paired);
    walk_through(a, t, 0, paired);
    finish_rows(&t->rows, a->output, a->sums, rows);
}

INLINE void backward(const task *a, walk *t, int paired) {
    int64_t rows = t->count * a->ratio;
    begin_rows(&t->rows, a->query, rows, paired);
    begin_slopes(&t->rows, a->output, a->slope, a->sums, rows, paired);
    walk_through(a, t, 1, paired);
    for (int64_t row = 0; row < rows; row++) {
        int64_t at = row_of(&t->rows, row);
        a->dots[at] = t->rows.dots[row];
        for (int64_t k = 0; k < a->size; k += LANES)
            put_vec(a->of_query, a->is_bf16, at * a->size + k, load_f32(t->rows.mixed + row * a->size + k));
    }
}

static void forward_paired(const task *a, walk *t) { forward(a, t, PAIRED(1)); }
static void forward_single(const task *a, walk *t) { forward(a, t, 0); }
static void backward_paired(const task *a, walk *t) { backward(a, t, PAIRED(1)); }
static void backward_single(const task *a, walk *t) { backward(a, t, 0); }

/* Cuts a thread's memory into the arrays of a walk; returns the number of floats that they take. */
static int64_t furnish(const task *a, walk *t, int64_t queries, float *base) {
    room left = {base, 0};
    int64_t rows = queries * a->ratio;
    furnish_tile(&t->rows, &left, rows, 1);
    t->cursors = (int32_t *)cut(&left, queries);
    t->row = (int32_t *)cut(&left, rows);
    t->from = (int32_t *)cut(&left, rows);
    t->end = (int32_t *)cut(&left, rows);
    return left.used;
}

static int run(const task *a, void (*of_walk)(const task *, walk *)) {
    int64_t queries = TOGETHER / a->ratio > 0 ? TOGETHER / a->ratio : 1, failed = 0;
    queries = queries < a->tokens ? queries : a->tokens;
    int64_t tiles = (a->tokens + queries - 1) / queries;
    int64_t work = a->tokens * a->groups * a->ratio * a->size * a->topk * a->block_size;
    walk shape = {.rows = {.groups = a->groups, .ratio = a->ratio, .size = a->size, .scale = a->scale,
                           .depth = cells(a->size, PAIRED(a->is_bf16)), .is_bf16 = a->is_bf16}};
#pragma omp parallel num_threads(a->threads) if (work >= WORTH_THREADS)
    {
        walk t = shape;
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
                t.rows.group = g;
                t.start = t.rows.token = i * queries;
                t.count = a->tokens - t.start < queries ? a->tokens - t.start : queries;
                of_walk(a, &t);
            }
        free(floats);
    }
    return (int)failed;
}

/* Fills `output` and `sums`; returns 1 if there is no memory. */
int longwave_attend(const task *a) { return run(a, PAIRED(a->is_bf16) ? forward_paired : forward_single); }

/* Fills `of_query` and `dots` from `output`, `sums` and `slope`; returns 1 if there is no memory. */
int longwave_attend_queries(const task *a) { return run(a, PAIRED(a->is_bf16) ? backward_paired : backward_single); }
