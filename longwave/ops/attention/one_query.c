/* Attention of single queries over the remembered keys of their sequences (flash-decoding, Dao et al. 2023).
 *
 * The keys of a sequence lie side by side or in pages, and are cut into splits of SPLIT keys. Threads take splits in any order, but their results are
 * merged in a fixed order, so that the output depends neither on the threads, nor on the other queries, nor on the pages.
 * Legend: S queries, H query heads, G KV heads, N keys of a sequence, K head size (a multiple of CHUNK).
 */

#include <stdlib.h>

#include "../compiled/vectors.h"

#define SPLIT 1024
#define HEADS 4    /* query heads of a group that read a key together */
#define CHANNELS 4 /* vectors of a value whose sums stay in registers */

/* Numbers that a split stores behind its K weighted sums, for merging: its largest score and the sum of its weights. */
#define LEFT 2

/* The keys of a split and their values: `count` of them from place `first` of the sequence on. Without pages a place is
 * the number of a key in the arrays, otherwise it is counted in the pages, each of `page_size` keys. */
typedef struct {
    array keys, values;
    const int32_t *pages;
    int64_t page_size, first, count;
} split;

/* The number of keys of a split, from its n-th on, that lie side by side; `at`: the first one's number in the arrays. */
INLINE int64_t stretch(const split *s, int64_t n, int64_t *at) {
    int64_t most = s->count - n, place = s->first + n;
    *at = place;
    if (!s->pages)
        return most;
    const int32_t *page = s->pages + place / s->page_size;
    int64_t offset = place % s->page_size, length = s->page_size - offset;
    *at = *page * s->page_size + offset;
    for (; length < most && page[1] == page[0] + 1; page++)
        length += s->page_size;
    return length < most ? length : most;
}

/* Fetches an entry of K numbers into the second cache, one stretch before it is needed: no processor guesses where the
 * next page lies, and what is fetched into the first cache keeps too few requests under way. */
INLINE void fetch(array entries, int64_t at, int64_t size) {
    for (int64_t k = 0; k < size; k += CHUNK)
        __builtin_prefetch(from(entries, at * size + k).data, 0, 2);
}

/* Scores of `heads` queries against the keys of a split -> scores (heads, SPLIT); -inf beyond the last key. */
INLINE void score(const split *s, array query, int heads, int64_t size, float scale, float *scores) {
    int64_t count = s->count, at, next, length = stretch(s, 0, &at), following;
    for (int64_t from_n = 0; from_n < count; from_n += length, at = next, length = following) {
        following = from_n + length < count ? stretch(s, from_n + length, &next) : 0;
        for (int64_t n = from_n; n < from_n + length; n++, at++) {
            if (n - from_n < following)
                fetch(s->keys, next + n - from_n, size);
            vec sums[HEADS];
            for (int h = 0; h < heads; h++)
                sums[h] = splat(0);
            for (int64_t k = 0; k < size; k += CHUNK)
                for (int h = 0; h < heads; h++)
                    sums[h] = add_products(sums[h], s->keys, at * size + k, query, h * size + k);
            for (int h = 0; h < heads; h++)
                scores[h * SPLIT + n] = scale * sum(sums[h]);
        }
    }
    for (int h = 0; h < heads; h++)
        for (int64_t n = count; n < SPLIT; n++)
            scores[h * SPLIT + n] = -INFINITY;
}

/* Turns scores into e^(score - largest), in place -> largest, sum. */
INLINE void weigh(float *scores, float *largest, float *total) {
    vec most = load_f32(scores);
    for (int64_t n = LANES; n < SPLIT; n += LANES)
        most = larger(most, load_f32(scores + n));
    *largest = most[0];
    for (int i = 1; i < LANES; i++)
        *largest = most[i] > *largest ? most[i] : *largest;
    vec sums = splat(0);
    for (int64_t n = 0; n < SPLIT; n += LANES) {
        vec weight = exp_negative(load_f32(scores + n) - *largest);
        store_f32(scores + n, weight);
        sums += weight;
    }
    *total = sum(sums);
}

/* Weighted sums of `vectors` vectors of channels of the values, from channel `from` on. */
INLINE void mix(const split *s, const float *weights, int heads, int vectors, int64_t size, int64_t from, float *out,
                int64_t stride) {
    int64_t at, next, length = stretch(s, 0, &at), following;
    vec sums[HEADS][CHANNELS];
    for (int h = 0; h < heads; h++)
        for (int c = 0; c < vectors; c++)
            sums[h][c] = splat(0);
    for (int64_t from_n = 0; from_n < s->count; from_n += length, at = next, length = following) {
        following = from_n + length < s->count ? stretch(s, from_n + length, &next) : 0;
        for (int64_t n = from_n; n < from_n + length; n++, at++) {
            if (n - from_n < following && !from)
                fetch(s->values, next + n - from_n, size);
            for (int c = 0; c < vectors; c++) {
                vec entry = load(s->values, at * size + from + c * LANES);
                for (int h = 0; h < heads; h++)
                    sums[h][c] += entry * weights[h * SPLIT + n];
            }
        }
    }
    for (int h = 0; h < heads; h++)
        for (int c = 0; c < vectors; c++)
            store_f32(out + h * stride + from + c * LANES, sums[h][c]);
}

INLINE void heads_of_split(const split *s, array query, int heads, int64_t size, float scale, float *out) {
    float scores[HEADS * SPLIT] __attribute__((aligned(64)));
    int64_t stride = size + LEFT, k = 0;
    score(s, query, heads, size, scale, scores);
    for (int h = 0; h < heads; h++)
        weigh(scores + h * SPLIT, out + h * stride + size, out + h * stride + size + 1);
    for (; k + CHANNELS * LANES <= size; k += CHANNELS * LANES)
        mix(s, scores, heads, CHANNELS, size, k, out, stride);
    for (; k < size; k += LANES)
        mix(s, scores, heads, 1, size, k, out, stride);
}

/* Attention of the query heads of one KV head over one split -> out (group, K + LEFT). */
INLINE void group_of_split(const split *s, array query, int64_t group, int64_t size, float scale, float *out) {
    for (int64_t head = 0; head < group; head += HEADS) {
        array q = from(query, head * size);
        float *o = out + head * (size + LEFT);
        switch (group - head) {
        case 1: heads_of_split(s, q, 1, size, scale, o); break;
        case 2: heads_of_split(s, q, 2, size, scale, o); break;
        case 3: heads_of_split(s, q, 3, size, scale, o); break;
        default: heads_of_split(s, q, HEADS, size, scale, o);
        }
    }
}

/* group_of_split, with the usual head sizes as constants, so that the compiler unrolls its loops for them. */
INLINE void split_of(const split *s, array query, int64_t group, int64_t size, float scale, float *out) {
    switch (size) {
    case 64: group_of_split(s, query, group, 64, scale, out); break;
    case 128: group_of_split(s, query, group, 128, scale, out); break;
    default: group_of_split(s, query, group, size, scale, out);
    }
}

static void split_of_bf16(split s, array query, int64_t group, int64_t size, float scale, float *out) {
    s.keys.is_bf16 = s.values.is_bf16 = 1;
    split_of(&s, (array){query.data, 1}, group, size, scale, out);
}

static void split_of_fp32(split s, array query, int64_t group, int64_t size, float scale, float *out) {
    s.keys.is_bf16 = s.values.is_bf16 = 0;
    split_of(&s, (array){query.data, 0}, group, size, scale, out);
}

/* Merges the splits (each K + LEFT numbers, `stride` apart) of one head -> K numbers of `out`, from place `at` on. */
static void merge(float *splits, int64_t count, int64_t stride, int64_t size, void *out, int is_bf16, int64_t at) {
    float largest = -INFINITY, total = 0;
    for (int64_t i = 0; i < count; i++)
        largest = fmaxf(largest, splits[i * stride + size]);
    for (int64_t i = 0; i < count; i++) {
        float share = expf(splits[i * stride + size] - largest);
        total += share * splits[i * stride + size + 1];
        for (int64_t k = 0; k < size; k++)
            splits[k] = (i ? splits[k] : 0) + share * splits[i * stride + k];
    }
    for (int64_t k = 0; k < size; k++)
        put(out, is_bf16, at + k, splits[k] / total);
}

/* query and out (S, H, K); keys and values (G, N, K), group_stride entries between KV heads; query s sees the places
 * begins[s] ... ends[s] - 1, at least one; all of bf16 or all of fp32. Without `pages` places are numbers of keys; with
 * them they are those of row of_query[s] of `pages` (.., table_size), or of row s. Returns 1 if there is no memory. */
int longwave_one_query(const void *query, const void *keys, const void *values, const int64_t *begins,
                       const int64_t *ends, const int32_t *pages, const int64_t *of_query, void *out, int is_bf16,
                       float scale, int64_t sequences, int64_t groups, int64_t group_stride, int64_t group,
                       int64_t size, int64_t table_size, int64_t page_size, int threads) {
    int64_t most = 0, all = 0, heads = groups * group, stride = size + LEFT;
    for (int64_t s = 0; s < sequences; s++) {
        int64_t length = ends[s] - begins[s];
        most = length > most ? length : most;
        all += length;
    }
    int64_t splits = (most + SPLIT - 1) / SPLIT;
    float *parts = malloc(sequences * heads * splits * stride * sizeof *parts);
    if (!parts)
        return 1;
#pragma omp parallel num_threads(threads) if (all * heads * size >= WORTH_THREADS)
    {
#pragma omp for collapse(3) schedule(dynamic)
        for (int64_t s = 0; s < sequences; s++)
            for (int64_t g = 0; g < groups; g++)
                for (int64_t i = 0; i < splits; i++) {
                    int64_t first = begins[s] + i * SPLIT, left = ends[s] - first;
                    if (left <= 0)
                        continue;
                    split one = {.page_size = page_size, .first = first, .count = left < SPLIT ? left : SPLIT};
                    one.keys = from((array){keys, is_bf16}, g * group_stride);
                    one.values = from((array){values, is_bf16}, g * group_stride);
                    one.pages = pages ? pages + (of_query ? of_query[s] : s) * table_size : NULL;
                    array q = from((array){query, is_bf16}, (s * heads + g * group) * size);
                    float *o = parts + ((s * groups + g) * splits + i) * group * stride;
                    (is_bf16 ? split_of_bf16 : split_of_fp32)(one, q, group, size, scale, o);
                }
#pragma omp for collapse(2) schedule(static)
        for (int64_t s = 0; s < sequences; s++)
            for (int64_t h = 0; h < heads; h++) {
                float *first = parts + ((s * groups + h / group) * splits * group + h % group) * stride;
                int64_t used = (ends[s] - begins[s] + SPLIT - 1) / SPLIT;
                merge(first, used, group * stride, size, out, is_bf16, (s * heads + h) * size);
            }
    }
    free(parts);
    return 0;
}
