// The product with a weight that is not packed, as a model's output head is.
#pragma once

#include <cstdint>

#include "levels.h"
#include "linear.h"

// y[t][r] = sum_i x[t][i] w[r][i], for few tokens: the weight is read once. A token's sums do not depend on the others.
// Mirrored in llmquant/kernels/cpu.py; a change of either needs a new value of llmquant_abi.
struct LlmquantDense {
    const void* x;  // [tokens][columns]
    const void* w;  // [rows][columns]
    void* y;        // [tokens][rows]
    int64_t tokens, rows, columns;
    int64_t kind;  // of all numbers
    int64_t threads, level;
};

// 0, or 1 if there is no memory for the tokens as they are multiplied.
LLMQUANT_EXPORT int64_t llmquant_dense(const LlmquantDense* task);
