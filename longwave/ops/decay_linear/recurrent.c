/* Decay linear attention as the recurrence itself: S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale q_t S_t.
 *
 * The matrix of a head stays in the first cache from token to token, so that this takes less time than products within
 * chunks would. Every number is made by the same operations in the same order, however the runs are cut.
 * Legend: T tokens, R runs, H heads, K key size, V value size (a multiple of LANES, at most WIDEST).
 */

#include "../compiled/vectors.h"

#define WIDEST 256

/* Entries of one head: the tokens are `stride` entries apart. */
typedef struct {
    array query, key, value;
    const float *decay; /* logarithms; `decay_stride` apart, 0 for one of all tokens */
    void *out;
    int64_t out_at, tokens, keys, key_stride, value_stride, decay_stride;
    float scale;
} head;

/* Runs the tokens of a head: `memory` (K, V) from before the first to after the last. */
INLINE void run_head(const head *a, float *memory, int vectors) {
    for (int64_t t = 0; t < a->tokens; t++) {
        vec value[WIDEST / LANES], mixed[WIDEST / LANES];
        float decay = expf(a->decay[t * a->decay_stride]);
        for (int v = 0; v < vectors; v++) {
            value[v] = load(a->value, t * a->value_stride + v * LANES);
            mixed[v] = splat(0);
        }
        for (int64_t k = 0; k < a->keys; k++) {
            float key = number(a->key, t * a->key_stride + k), query = number(a->query, t * a->key_stride + k);
            float *row = memory + k * vectors * LANES;
            for (int v = 0; v < vectors; v++) {
                vec entry = load_f32(row + v * LANES) * decay + value[v] * key;
                store_f32(row + v * LANES, entry);
                mixed[v] += entry * query;
            }
        }
        for (int v = 0; v < vectors; v++)
            for (int i = 0; i < LANES; i++)
                put(a->out, a->value.is_bf16, a->out_at + t * a->value_stride + v * LANES + i,
                    mixed[v][i] * a->scale);
    }
}

/* run_head, with the usual sizes and types as constants. */
INLINE void run_of(const head *a, float *memory, int vectors) {
    switch (vectors) {
    case 2: run_head(a, memory, 2); break;
    case 4: run_head(a, memory, 4); break;
    case 8: run_head(a, memory, 8); break;
    default: run_head(a, memory, vectors);
    }
}

static void run_bf16(head a, float *memory, int vectors) {
    a.query.is_bf16 = a.key.is_bf16 = a.value.is_bf16 = 1;
    run_of(&a, memory, vectors);
}

static void run_fp32(head a, float *memory, int vectors) {
    a.query.is_bf16 = a.key.is_bf16 = a.value.is_bf16 = 0;
    run_of(&a, memory, vectors);
}

/* query, key (T, H, K), value and out (T, H, V), all of bf16 or all of fp32; decay (1 or T, H) and the memory (R, H, K,
 * V) of fp32, which holds the one before the first token of each run, and then that after its last; bounds (R + 1). */
void longwave_recurrent(const void *query, const void *key, const void *value, const float *decay, float *memory,
                        void *out, const int64_t *bounds, int is_bf16, int decay_per_token, float scale, int64_t runs,
                        int64_t heads, int64_t keys, int64_t values, int threads) {
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)                                           \
    if ((bounds[runs] - bounds[0]) * heads * keys * values >= WORTH_THREADS)
    for (int64_t r = 0; r < runs; r++)
        for (int64_t h = 0; h < heads; h++) {
            int64_t first = bounds[r], at_key = (first * heads + h) * keys, at_value = (first * heads + h) * values;
            head a = {from((array){query, is_bf16}, at_key),
                      from((array){key, is_bf16}, at_key),
                      from((array){value, is_bf16}, at_value),
                      decay + (decay_per_token ? first * heads : 0) + h,
                      out,
                      at_value,
                      bounds[r + 1] - first,
                      keys,
                      heads * keys,
                      heads * values,
                      decay_per_token ? heads : 0,
                      scale};
            (is_bf16 ? run_bf16 : run_fp32)(a, memory + (r * heads + h) * keys * values, (int)(values / LANES));
        }
}
