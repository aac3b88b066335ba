/* y = x W^T + b for few rows: every row of W is read once, from memory, for all rows of x.
 *
 * The order in which an entry of y is summed does not depend on the number of rows, so a row gives the same result
 * alone and among others.
 * Legend: T rows, D inputs (a multiple of CHUNK), E outputs (an even number).
 */

#include "../compiled/vectors.h"

#define OUTPUTS 2  /* rows of W that share what is loaded of x */
#define TOGETHER 8 /* rows of x that share a load of W */
#define AHEAD 4096 /* bytes by which W is prefetched ahead of its use */

/* sums[r][o] = the product of row r of x with row output + o of W, for `rows` rows of x. */
INLINE void block(array x, array weight, int rows, int64_t output, int64_t inputs, float sums[TOGETHER][OUTPUTS]) {
    vec parts[TOGETHER][OUTPUTS];
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < OUTPUTS; o++)
            parts[r][o] = splat(0);
    for (int64_t d = 0; d < inputs; d += CHUNK) {
        for (int o = 0; o < OUTPUTS; o++)
            prefetch(weight, (output + o) * inputs + d, AHEAD);
        for (int r = 0; r < rows; r++)
            for (int o = 0; o < OUTPUTS; o++)
                parts[r][o] = add_products(parts[r][o], weight, (output + o) * inputs + d, x, r * inputs + d);
    }
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < OUTPUTS; o++)
            sums[r][o] = sum(parts[r][o]);
}

/* block, with the number of rows as a constant, so that sums stay in registers. */
INLINE void block_of(array x, array weight, int64_t rows, int64_t output, int64_t inputs,
                     float sums[TOGETHER][OUTPUTS]) {
    switch (rows) {
    case 1: block(x, weight, 1, output, inputs, sums); break;
    case 2: block(x, weight, 2, output, inputs, sums); break;
    case 3: block(x, weight, 3, output, inputs, sums); break;
    case 4: block(x, weight, 4, output, inputs, sums); break;
    case 5: block(x, weight, 5, output, inputs, sums); break;
    case 6: block(x, weight, 6, output, inputs, sums); break;
    case 7: block(x, weight, 7, output, inputs, sums); break;
    default: block(x, weight, TOGETHER, output, inputs, sums);
    }
}

/* x (T, D), weight (E, D), bias (E) or null and y (T, E), all of bf16 or all of fp32. */
void longwave_linear(const void *x, const void *weight, const void *bias, void *y, int is_bf16, int64_t rows,
                     int64_t inputs, int64_t outputs, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * inputs * outputs >= WORTH_THREADS)
    for (int64_t output = 0; output < outputs; output += OUTPUTS)
        for (int64_t row = 0; row < rows; row += TOGETHER) {
            int64_t count = rows - row < TOGETHER ? rows - row : TOGETHER;
            float sums[TOGETHER][OUTPUTS];
            if (is_bf16)
                block_of(from((array){x, 1}, row * inputs), (array){weight, 1}, count, output, inputs, sums);
            else
                block_of(from((array){x, 0}, row * inputs), (array){weight, 0}, count, output, inputs, sums);
            for (int64_t r = 0; r < count; r++)
                for (int o = 0; o < OUTPUTS; o++) {
                    float shift = bias ? number((array){bias, is_bf16}, output + o) : 0.0f;
                    put(y, is_bf16, (row + r) * outputs + output + o, sums[r][o] + shift);
                }
        }
}
