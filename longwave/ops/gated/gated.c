/* act(x) * y, entry by entry, for the sigmoid and for SiLU. Every entry goes through the same vector operations,
 * wherever it stands, so that its result does not depend on how many others there are. */

#include "../compiled/vectors.h"

#define AT_ONCE 4096 /* entries that a thread takes */

INLINE vec rounded(vec x, int is_bf16) {
    if (!is_bf16)
        return x;
    uint16_t halves[LANES];
    for (int i = 0; i < LANES; i++)
        put(halves, 1, i, x[i]);
    return load((array){(const char *)halves, 1}, 0);
}

/* `count` entries, at most LANES, from place `at` on; y may be null. */
INLINE void gate(array x, array y, void *out, int64_t at, int64_t count, int silu) {
    float given[LANES] = {0}, factors[LANES];
    for (int64_t i = 0; i < count; i++) {
        given[i] = number(x, at + i);
        factors[i] = y.data ? number(y, at + i) : 1.0f;
    }
    vec value = load_f32(given), share = splat(1) / (splat(1) + exp_negative(-value));
    value = rounded(silu ? value * share : share, x.is_bf16);
    for (int64_t i = 0; i < count; i++)
        put(out, x.is_bf16, at + i, value[i] * factors[i]);
}

/* x, y (or null) and out of `count` entries each, all of bf16 or all of fp32. */
void longwave_gated(const void *x, const void *y, void *out, int is_bf16, int silu, int64_t count, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (count >= WORTH_THREADS)
    for (int64_t first = 0; first < count; first += AT_ONCE)
        for (int64_t at = first; at < first + AT_ONCE && at < count; at += LANES)
            gate((array){x, is_bf16}, (array){y, is_bf16}, out, at, count - at < LANES ? count - at : LANES, silu);
}
