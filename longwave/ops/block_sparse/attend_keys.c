/* The gradients of keys and values: for every block, over the queries that see it, in their order.
 *
 * One thread works on a whole block, so that sums are always in the same order. Here keys are the rows, and the heads
 * of PIECE / R queries at a time the columns.
 * Legend: T queries and N keys, H query heads, G KV heads, R = H / G, K head size.
 */

#include "attend.h"

/* The queries that see block i, counted over groups and blocks: queries[starts[i]] ... queries[starts[i + 1] - 1]. */
typedef struct {
    int64_t blocks, *starts;
    int32_t *queries;
} inverse;

/* One thread's piece of keys, and a batch of PIECE rows of queries. */
typedef struct {
    int64_t group, from, end, depth;
    float *keys, *values;              /* (PIECE, depth) */
    float *of_keys, *of_values;        /* (PIECE, K) */
    float *queries, *slopes;           /* columns of the batch */
    float *query_pairs, *slope_pairs;  /* pairs of the batch */
    float *logs, *dots, *seen;         /* (PIECE): log2 of the denominators, o . do, how many keys each sees */
    float *weights, *bends;            /* (ROWS, PIECE): the weights, and the gradients of the scores */
} piece;

/* Turns lists of blocks by query into lists of queries by block, in order; returns 1 if there is no memory. */
static int invert(const task *a, inverse *of) {
    int64_t entries = a->groups * a->tokens * a->topk, each = a->tokens * a->topk;
    of->blocks = (a->keys_count + a->block_size - 1) / a->block_size;
    of->starts = calloc(a->groups * of->blocks + 2, sizeof *of->starts);
    of->queries = malloc((entries + 1) * sizeof *of->queries);
    if (!of->starts || !of->queries)
        return 1;
    int64_t *next = of->starts + 1; /* as lists are filled, their ends become the starts of those behind them */
    for (int64_t i = 0; i < entries; i++)
        if (a->blocks[i] >= 0)
            next[i / each * of->blocks + a->blocks[i] + 1]++;
    for (int64_t i = 0; i < a->groups * of->blocks; i++)
        next[i + 1] += next[i];
    for (int64_t i = 0; i < entries; i++)
        if (a->blocks[i] >= 0)
            of->queries[next[i / each * of->blocks + a->blocks[i]]++] = (int32_t)(i % each / a->topk);
    return 0;
}

/* Lays out the rows from ... end - 1 (counted over queries and heads) of a block's queries; the rest are zeros. */
INLINE void lay_batch(const task *a, const piece *p, const int32_t *queries, int64_t from, int64_t end, int paired) {
    const void *query[PIECE], *slope[PIECE];
    for (int64_t i = 0; i < PIECE; i++) {
        int64_t row = from + i, seen = 0, at = 0;
        if (row < end) {
            seen = a->first + queries[row / a->ratio] + 1 - p->from;
            at = (queries[row / a->ratio] * a->groups + p->group) * a->ratio + row % a->ratio;
        }
        query[i] = row < end ? array_at((array){a->query, a->is_bf16}, at * a->size) : ZEROS;
        slope[i] = row < end ? array_at((array){a->slope, a->is_bf16}, at * a->size) : ZEROS;
        p->logs[i] = row < end ? a->sums[at] * LOG2E : 0;
        p->dots[i] = row < end ? a->dots[at] : 0;
        p->seen[i] = (float)(seen < PIECE ? seen : PIECE);
    }
    lay_columns(query, query, a->is_bf16, p->depth, VECTORS, 1, LANES, p->queries, paired);
    lay_columns(slope, slope, a->is_bf16, p->depth, VECTORS, 1, LANES, p->slopes, paired);
    lay_pairs(query, query, a->is_bf16, PIECE, a->size, p->query_pairs, paired);
    lay_pairs(slope, slope, a->is_bf16, PIECE, a->size, p->slope_pairs, paired);
}

/* Adds a batch to the gradients of keys n ... n + ROWS - 1: dv = sum p do, dk = scale sum p (do . v - do . o) q. */
INLINE void add_batch(const task *a, const piece *p, int64_t n, int paired) {
    vec scores[ROWS][VECTORS], slopes[ROWS][VECTORS];
    const float *key[ROWS], *value[ROWS], *weights[ROWS], *bends[ROWS], share[ROWS] = {1, 1, 1, 1};
    float *of_key[ROWS], *of_value[ROWS];
    for (int r = 0; r < ROWS; r++) {
        key[r] = p->keys + (n + r) * p->depth;
        value[r] = p->values + (n + r) * p->depth;
        of_key[r] = p->of_keys + (n + r) * a->size;
        of_value[r] = p->of_values + (n + r) * a->size;
        weights[r] = p->weights + r * PIECE;
        bends[r] = p->bends + r * PIECE;
    }
    products(key, p->queries, p->depth, VECTORS, ROWS, VECTORS, scores, paired);
    products(value, p->slopes, p->depth, VECTORS, ROWS, VECTORS, slopes, paired);
    for (int r = 0; r < ROWS; r++) {
        for (int v = 0; v < VECTORS; v++) {
            vec_i32 hidden = load_f32(p->seen + v * LANES) <= (float)(n + r);
            vec weight = exp2_of(scores[r][v] * (a->scale * LOG2E) - load_f32(p->logs + v * LANES));
            scores[r][v] = pick(hidden, splat(0), weight);
            vec bend = weight * (slopes[r][v] - load_f32(p->dots + v * LANES)) * a->scale;
            slopes[r][v] = pick(hidden, splat(0), bend);
        }
        store_cells(p->weights + r * PIECE, scores[r], VECTORS, paired);
        store_cells(p->bends + r * PIECE, slopes[r], VECTORS, paired);
    }
    mix(of_value, share, weights, p->slope_pairs, cells(PIECE, paired), a->size, ROWS, paired);
    mix(of_key, share, bends, p->query_pairs, cells(PIECE, paired), a->size, ROWS, paired);
}

INLINE void gradients_of_piece(const task *a, const piece *p, const int32_t *queries, int64_t count, int paired) {
    const void *keys[PIECE], *values[PIECE];
    find_rows(a->keys, a->is_bf16, a->key_group, a->key_token, p->group, p->from, p->end, keys);
    find_rows(a->values, a->is_bf16, a->value_group, a->value_token, p->group, p->from, p->end, values);
    for (int64_t n = 0; n < PIECE; n++) {
        lay_row(keys[n], a->is_bf16, p->depth, p->keys + n * p->depth, paired);
        lay_row(values[n], a->is_bf16, p->depth, p->values + n * p->depth, paired);
    }
    memset(p->of_keys, 0, PIECE * a->size * sizeof *p->of_keys);
    memset(p->of_values, 0, PIECE * a->size * sizeof *p->of_values);
    for (int64_t from = 0; from < count * a->ratio; from += PIECE) {
        lay_batch(a, p, queries, from, count * a->ratio, paired);
        for (int64_t n = 0; n < p->end - p->from; n += ROWS)
            add_batch(a, p, n, paired);
    }
    for (int64_t i = 0; i < (p->end - p->from) * a->size; i++) {
        int64_t at = (p->group * a->keys_count + p->from) * a->size + i;
        put(a->of_keys, a->is_bf16, at, p->of_keys[i]);
        put(a->of_values, a->is_bf16, at, p->of_values[i]);
    }
}

static void gradients_paired(const task *a, const piece *p, const int32_t *queries, int64_t count) {
    gradients_of_piece(a, p, queries, count, PAIRED(1));
}

static void gradients_single(const task *a, const piece *p, const int32_t *queries, int64_t count) {
    gradients_of_piece(a, p, queries, count, 0);
}

/* Cuts a thread's memory into the arrays of a piece; returns the number of floats that they take. */
static int64_t furnish(const task *a, piece *p, float *base) {
    room left = {base, 0};
    float **laid[] = {&p->keys, &p->values, &p->queries, &p->slopes};
    float **whole[] = {&p->of_keys, &p->of_values, &p->query_pairs, &p->slope_pairs};
    float **rows[] = {&p->logs, &p->dots, &p->seen};
    for (int i = 0; i < 4; i++) {
        *laid[i] = cut(&left, PIECE * p->depth);
        *whole[i] = cut(&left, PIECE * a->size);
    }
    for (int i = 0; i < 3; i++)
        *rows[i] = cut(&left, PIECE);
    p->weights = cut(&left, ROWS * PIECE);
    p->bends = cut(&left, ROWS * PIECE);
    return left.used;
}

/* The gradients of the keys and values of one block, a piece at a time. */
static void gradients_of_block(const task *a, piece *p, const inverse *of, int64_t group, int64_t block) {
    int64_t start = block * a->block_size, end = start + a->block_size, i = group * of->blocks + block;
    end = end < a->keys_count ? end : a->keys_count;
    for (int64_t from = start; from < end; from += PIECE) {
        p->group = group;
        p->from = from;
        p->end = end - from < PIECE ? end : from + PIECE;
        (PAIRED(a->is_bf16) ? gradients_paired : gradients_single)(a, p, of->queries + of->starts[i],
                                                                  of->starts[i + 1] - of->starts[i]);
    }
}

/* Fills `of_keys` and `of_values` from `sums`, `dots` and `slope`; returns 1 if there is no memory. */
int longwave_attend_keys(const task *a) {
    inverse of;
    int64_t failed = 0, work = a->tokens * a->groups * a->ratio * a->size * a->topk * a->block_size;
    piece shape = {.depth = cells(a->size, PAIRED(a->is_bf16))};
    if (invert(a, &of)) {
        free(of.starts);
        free(of.queries);
        return 1;
    }
#pragma omp parallel num_threads(a->threads) if (work >= WORTH_THREADS)
    {
        piece p = shape;
        float *floats = aligned_alloc(64, furnish(a, &p, NULL) * sizeof *floats);
        if (!floats)
#pragma omp atomic write
            failed = 1;
        else
            furnish(a, &p, floats);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t g = 0; g < a->groups; g++)
            for (int64_t block = 0; block < of.blocks; block++)
                if (floats)
                    gradients_of_block(a, &p, &of, g, block);
        free(floats);
    }
    free(of.starts);
    free(of.queries);
    return (int)failed;
}
