/* The choice of the blocks that a query sees (InfLLM-V2, arXiv 2509.24663): scores of compressed keys, their maxima
 * over blocks, and the best blocks.
 *
 * `Window` is short for the compressed key of a window. A tile of queries goes over all windows twice, a piece at a
 * time: for the denominators, and then for the scores. Scores are summed over the heads of a group and reduced to one
 * number a block at once, so that no array of all scores is held. A piece of the second pass is the windows of LANES
 * blocks, with window `r b + v` in lane b of vector v, so that maxima over blocks are maxima of vectors.
 * Legend: T queries, H query heads, G KV heads, R = H / G, K head size, r windows that begin in a block.
 */

#include "../compiled/rows.h"

#define TOGETHER 128 /* about how many rows a tile has: each window that is loaded is used so often */

typedef struct {
    const void *query, *fine, *coarse; /* (T, H, K), and (G, windows, K) with the given strides between groups */
    int32_t *blocks;                   /* (G, T, topk) */
    int64_t fine_stride, coarse_stride, tokens, groups, ratio, size, first;
    int64_t kernel_size, stride, coarser, block_size, init_blocks, local_blocks, topk;
    int is_bf16, exact, threads;
    float scale;
} selection;

/* One thread's tile: the queries start ... start + count - 1 of a group, and the arrays of its intermediate results. */
typedef struct {
    int64_t group, start, count, depth, strides, blocks;
    float *cells;         /* (count R, depth) */
    float *most, *totals; /* (count R, LANES): by lane, the largest score of its windows and the sum of their weights */
    float *logs;          /* (count R): log2 of the denominators */
    float *columns;       /* windows of a piece */
    float *sums;          /* (count, strides, LANES): scores of a piece, summed over heads */
    float *carried;       /* (count): the score of the window before the piece */
    float *scores;        /* (count, blocks) */
    uint64_t *ranked, *chosen;
} tile;

INLINE int64_t place(const selection *s, const tile *t, int64_t query) { return s->first + t->start + query; }

/* The number of windows that a query sees: those that are complete at its place. */
INLINE int64_t visible(const selection *s, int64_t place, int64_t coarser) {
    int64_t beyond = place + 1 - coarser * s->kernel_size;
    return beyond < 0 ? 0 : beyond / (coarser * s->stride) + 1;
}

/* Whether a query sees more blocks than it may choose, so that scores matter. */
INLINE int chooses(const selection *s, int64_t place) { return place / s->block_size + 1 > s->topk; }

/* Lays out windows from `from` on, with zeros in place of those from `end` on, and prefetches as many more. */
INLINE void lay_windows(const selection *s, const tile *t, const void *table, int64_t stride, int64_t from, int64_t end,
                        int64_t vectors, int64_t lane_step, int64_t vector_step, int paired) {
    int64_t count = vectors * LANES;
    const void *rows[count], *next[count];
    array first = {array_at((array){table, s->is_bf16}, t->group * stride + from * s->size), s->is_bf16};
    for (int64_t i = 0; i < count; i++) {
        rows[i] = from + i < end ? array_at(first, i * s->size) : ZEROS;
        next[i] = from + i + count < end ? array_at(first, (i + count) * s->size) : ZEROS;
    }
    lay_columns(rows, next, s->is_bf16, t->depth, vectors, lane_step, vector_step, t->columns, paired);
}

/* Adds a piece of windows to the denominators of `rows` rows; each row sees the windows before its entry in `seen`. */
INLINE void add_weights(const tile *t, int64_t row, const int64_t *seen, int64_t from, int rows, float scale,
                        int paired) {
    vec scores[ROWS][VECTORS];
    const float *cell[ROWS];
    for (int r = 0; r < rows; r++)
        cell[r] = t->cells + (row + r) * t->depth;
    products(cell, t->columns, t->depth, VECTORS, rows, VECTORS, scores, paired);
    for (int r = 0; r < rows; r++) {
        vec before = load_f32(t->most + (row + r) * LANES), most = before;
        for (int v = 0; v < VECTORS; v++) {
            vec_i32 hidden = PLACES + (int32_t)(v * LANES) >= (int32_t)(seen[r] - from);
            scores[r][v] = pick(hidden, splat(-INFINITY), scores[r][v] * scale);
            most = larger(most, scores[r][v]);
        }
        vec total = load_f32(t->totals + (row + r) * LANES) * exp2_of(before - most);
        for (int v = 0; v < VECTORS; v++)
            total += exp2_of(scores[r][v] - most);
        store_f32(t->most + (row + r) * LANES, most);
        store_f32(t->totals + (row + r) * LANES, total);
    }
}

/* The denominators of all rows over one table of windows: the first pass. */
INLINE void denominators(const selection *s, tile *t, const void *table, int64_t stride, int64_t coarser, int paired) {
    int64_t rows = t->count * s->ratio, query = 0, end = visible(s, place(s, t, t->count - 1), coarser);
    for (int64_t i = 0; i < rows * LANES; i++) {
        t->most[i] = -1e30f;
        t->totals[i] = 0;
    }
    for (int64_t from = 0; from < end; from += PIECE) {
        lay_windows(s, t, table, stride, from, end, VECTORS, 1, LANES, paired);
        while (visible(s, place(s, t, query), coarser) <= from)
            query++;
        for (int64_t row = query * s->ratio; row < rows;) {
            int64_t seen[ROWS], left = rows - row;
            for (int r = 0; r < ROWS && r < left; r++)
                seen[r] = visible(s, place(s, t, (row + r) / s->ratio), coarser);
            if (left >= ROWS)
                add_weights(t, row, seen, from, ROWS, s->scale * LOG2E, paired);
            else
                add_weights(t, row, seen, from, 1, s->scale * LOG2E, paired);
            row += left >= ROWS ? ROWS : 1;
        }
    }
    for (int64_t row = 0; row < rows; row++) {
        vec most = load_f32(t->most + row * LANES);
        float largest = largest_of(most), total = sum(load_f32(t->totals + row * LANES) * exp2_of(most - largest));
        t->logs[row] = total == 0 ? INFINITY : largest + log2f(total);
    }
}

/* Adds the weights of `vectors` vectors of windows of `rows` rows to the sums of their queries. */
INLINE void add_scores(const selection *s, const tile *t, int64_t row, int64_t vector, int rows, int vectors,
                       int paired) {
    vec scores[ROWS][VECTORS];
    const float *cell[ROWS];
    for (int r = 0; r < rows; r++)
        cell[r] = t->cells + (row + r) * t->depth;
    products(cell, t->columns + vector * LANES, t->depth, t->strides, rows, vectors, scores, paired);
    for (int r = 0; r < rows; r++) {
        float *sums = t->sums + ((row + r) / s->ratio * t->strides + vector) * LANES;
        for (int v = 0; v < vectors; v++) {
            vec weight = exp2_of(scores[r][v] * (s->scale * LOG2E) - t->logs[row + r]);
            store_f32(sums + v * LANES, load_f32(sums + v * LANES) + weight);
        }
    }
}

/* The scores of LANES blocks: the largest of the windows r b - 1 ... r b + r - 1, or -1 if none is visible. A NaN is
 * larger than nothing, so it does not count. */
INLINE void reduce(const selection *s, const tile *t, int64_t query, int64_t block) {
    const float *sums = t->sums + query * t->strides * LANES;
    int64_t seen = visible(s, place(s, t, query), 1) - block * t->strides;
    vec most = splat(-1), last = most;
    for (int64_t v = 0; v < t->strides; v++) {
        vec_i32 hidden = PLACES * (int32_t)t->strides + (int32_t)v >= (int32_t)seen;
        last = load_f32(sums + v * LANES);
        last = pick(hidden, splat(-1), last);
        most = larger(most, last);
    }
    vec before = SHUFFLE(last, last, 15, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14);
    before[0] = t->carried[query];
    t->carried[query] = last[LANES - 1];
    store_f32(t->scores + query * t->blocks + block, larger(most, before));
}

/* The scores of all blocks that some query of the tile may choose: the second pass. */
INLINE void score(const selection *s, tile *t, int paired) {
    int64_t rows = t->count * s->ratio, r = t->strides, last = place(s, t, t->count - 1);
    int64_t end = visible(s, last, 1), blocks = last / s->block_size - s->local_blocks;
    for (int64_t query = 0; query < t->count; query++)
        t->carried[query] = -1;
    for (int64_t block = 0; block < blocks; block += LANES) {
        lay_windows(s, t, s->fine, s->fine_stride, block * r, end, r, r, 1, paired);
        memset(t->sums, 0, t->count * r * LANES * sizeof *t->sums);
        for (int64_t row = 0; row < rows; row += rows - row >= ROWS ? ROWS : 1)
            for (int64_t v = 0; v < r; v += r - v >= VECTORS ? VECTORS : 1) {
                if (rows - row >= ROWS && r - v >= VECTORS)
                    add_scores(s, t, row, v, ROWS, VECTORS, paired);
                else if (rows - row >= ROWS)
                    add_scores(s, t, row, v, ROWS, 1, paired);
                else if (r - v >= VECTORS)
                    add_scores(s, t, row, v, 1, VECTORS, paired);
                else
                    add_scores(s, t, row, v, 1, 1, paired);
            }
        for (int64_t query = 0; query < t->count; query++)
            reduce(s, t, query, block);
    }
}

/* Moves the `count` largest of `total` different numbers to the front, in any order. */
static void largest_first(uint64_t *x, int64_t total, int64_t count) {
    int64_t low = 0, high = total - 1;
    while (low < high) {
        uint64_t pivot = x[low + (high - low) / 2];
        int64_t i = low, j = high;
        while (i <= j) {
            while (x[i] > pivot)
                i++;
            while (x[j] < pivot)
                j--;
            if (i <= j) {
                uint64_t other = x[i];
                x[i++] = x[j];
                x[j--] = other;
            }
        }
        if (count <= j)
            high = j;
        else if (count > i)
            low = i;
        else
            return;
    }
}

/* A score (-1 or at least 0) and a block as one number: larger for the larger score, then for the earlier block. */
INLINE uint64_t rank(float score, int64_t block) {
    uint32_t bits;
    memcpy(&bits, &score, sizeof bits);
    return (uint64_t)(bits ^ 0x80000000u) << 32 | (uint32_t)~block;
}

#define HELD(topk) (8 * (topk)) /* blocks that are held before the best of them are found */

INLINE void mark(const tile *t, int64_t block) { t->chosen[block / 64] |= (uint64_t)1 << block % 64; }

/* Marks the `count` best among the blocks from ... end - 1. */
static void mark_best(const tile *t, const float *scores, int64_t from, int64_t end, int64_t count, int64_t held) {
    int64_t have = 0;
    float least = -INFINITY;
    for (int64_t block = from; block < end && count; block++) {
        if (!(scores[block] > least))
            continue;
        t->ranked[have++] = rank(scores[block], block);
        if (have < held)
            continue;
        largest_first(t->ranked, have, count);
        have = count;
        for (int64_t i = 0; i < count; i++) {
            float one = scores[(uint32_t)~t->ranked[i]];
            least = i && one > least ? least : one;
        }
    }
    largest_first(t->ranked, have, count);
    for (int64_t i = 0; i < count; i++)
        mark(t, (uint32_t)~t->ranked[i]);
}

/* Writes the list of a query: the first blocks, its own and the ones just before, the best of the others; then -1. */
static void list(const selection *s, const tile *t, int64_t query) {
    int64_t own = place(s, t, query) / s->block_size, local = own - s->local_blocks, found = 0;
    int32_t *out = s->blocks + (t->group * s->tokens + t->start + query) * s->topk;
    if (own + 1 <= s->topk) {
        for (int64_t i = 0; i < s->topk; i++)
            out[i] = i <= own ? (int32_t)i : -1;
        return;
    }
    memset(t->chosen, 0, (own / 64 + 1) * sizeof *t->chosen);
    for (int64_t block = 0; block < s->init_blocks; block++)
        mark(t, block);
    for (int64_t block = local; block <= own; block++)
        mark(t, block);
    mark_best(t, t->scores + query * t->blocks, s->init_blocks, local,
              s->topk - s->init_blocks - s->local_blocks - 1, HELD(s->topk));
    for (int64_t word = 0; word <= own / 64; word++)
        for (uint64_t left = t->chosen[word]; left; left &= left - 1)
            out[found++] = (int32_t)(word * 64 + __builtin_ctzll(left));
}

INLINE void select_of_tile(const selection *s, tile *t, int paired) {
    if (chooses(s, place(s, t, t->count - 1))) {
        array query = {s->query, s->is_bf16};
        for (int64_t row = 0; row < t->count * s->ratio; row++) {
            int64_t of_query = (t->start + row / s->ratio) * s->groups + t->group;
            const void *from = array_at(query, (of_query * s->ratio + row % s->ratio) * s->size);
            lay_row(from, s->is_bf16, t->depth, t->cells + row * t->depth, paired);
        }
        if (s->exact)
            denominators(s, t, s->fine, s->fine_stride, 1, paired);
        else
            denominators(s, t, s->coarse, s->coarse_stride, s->coarser, paired);
        score(s, t, paired);
    }
    for (int64_t query = 0; query < t->count; query++)
        list(s, t, query);
}

static void select_paired(const selection *s, tile *t) { select_of_tile(s, t, PAIRED(1)); }
static void select_single(const selection *s, tile *t) { select_of_tile(s, t, 0); }

/* Cuts a thread's memory into the arrays of a tile; returns the number of floats that they take. */
static int64_t furnish(const selection *s, tile *t, int64_t queries, float *base) {
    room left = {base, 0};
    int64_t rows = queries * s->ratio, columns = (t->strides > VECTORS ? t->strides : VECTORS) * LANES;
    t->cells = cut(&left, rows * t->depth);
    t->most = cut(&left, rows * LANES);
    t->totals = cut(&left, rows * LANES);
    t->logs = cut(&left, rows);
    t->columns = cut(&left, columns * t->depth);
    t->sums = cut(&left, queries * t->strides * LANES);
    t->carried = cut(&left, queries);
    t->scores = cut(&left, queries * t->blocks);
    t->ranked = (uint64_t *)cut(&left, 2 * HELD(s->topk));
    t->chosen = (uint64_t *)cut(&left, 2 * (t->blocks / 64 + 1));
    return left.used;
}

/* Fills `blocks`; returns 1 if there is no memory. */
int longwave_select(const selection *s) {
    int64_t queries = TOGETHER / s->ratio > 0 ? TOGETHER / s->ratio : 1, failed = 0;
    queries = queries < s->tokens ? queries : s->tokens;
    int64_t tiles = (s->tokens + queries - 1) / queries, rows = s->tokens * s->groups * s->ratio;
    int64_t work = rows * s->size * ((s->first + s->tokens) / s->stride);
    tile shape = {.depth = cells(s->size, PAIRED(s->is_bf16)), .strides = s->block_size / s->stride};
    shape.blocks = rounded((s->first + s->tokens) / s->block_size + 1);
#pragma omp parallel num_threads(s->threads) if (work >= WORTH_THREADS)
    {
        tile t = shape;
        float *floats = aligned_alloc(64, furnish(s, &t, queries, NULL) * sizeof *floats);
        if (!floats)
#pragma omp atomic write
            failed = 1;
        else
            furnish(s, &t, queries, floats);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t g = 0; g < s->groups; g++)
            for (int64_t i = 0; i < tiles; i++) {
                if (!floats)
                    continue;
                t.group = g;
                t.start = (tiles - 1 - i) * queries; /* the longest first */
                t.count = s->tokens - t.start < queries ? s->tokens - t.start : queries;
                (PAIRED(s->is_bf16) ? select_paired : select_single)(s, &t);
            }
        free(floats);
    }
    return (int)failed;
}
