/* The arguments and results of attention to given blocks, for the forward and the backward pass. */

#include "../compiled/softmax.h"

typedef struct {
    const void *query, *keys, *values; /* (T, H, K), (G, N, K) twice */
    const int32_t *blocks;             /* (G, T, topk), ascending, filled up with -1 */
    void *output;                      /* (T, H, K) */
    float *sums;                       /* (T, H): log-sum-exp of the scores */
    const void *slope;                 /* (T, H, K): the gradient of the output */
    float *dots;                       /* (T, H): the output times its gradient */
    void *of_query, *of_keys, *of_values; /* the gradients; of keys and values (G, N, K) */
    int64_t key_group, key_token, value_group, value_token; /* entries between groups and between tokens */
    int64_t tokens, keys_count, groups, ratio, size, first, topk, block_size;
    int32_t is_bf16, threads;
    float scale;
} task;

/* The addresses of the rows from ... from + PIECE - 1 of a group's keys or values; from `end` on, of a row of zeros. */
INLINE void find_rows(const void *entries, int is_bf16, int64_t group_step, int64_t token_step, int64_t group,
                      int64_t from, int64_t end, const void **rows) {
    for (int64_t i = 0; i < PIECE; i++) {
        int64_t at = group * group_step + (from + i) * token_step;
        rows[i] = from + i < end ? array_at((array){entries, is_bf16}, at) : ZEROS;
    }
}
