// Which path computes a product, by its tokens: a table, to be replaced by a measured one. (Not measured yet: what the
// sizes of the memory traffic suggest; see docs/cuda.md.)
#pragma once

#include "llmquant_cuda.h"

namespace llmquant::cuda {

constexpr int64_t MOST_GEMV_TOKENS = 8;

struct Limit {
    int capability;       // from this one on
    int64_t gemm_tokens;  // up to so many the weights are dequantized inside of the product
};

constexpr Limit LIMITS[] = {{90, 512}, {80, 256}};

constexpr int64_t path_for(int64_t tokens, int capability) {
    if (tokens <= MOST_GEMV_TOKENS) return LLMQUANT_CUDA_GEMV;
    for (const Limit& limit : LIMITS)
        if (capability >= limit.capability)
            return tokens <= limit.gemm_tokens ? LLMQUANT_CUDA_GEMM : LLMQUANT_CUDA_DEQUANTIZE;
    return LLMQUANT_CUDA_DEQUANTIZE;
}

}  // namespace llmquant::cuda
