// Which path computes a product: a table, measured on an H200 (docs/results) for sm_90, and guessed for the others.
#pragma once

#include "llmquant_cuda.h"

namespace llmquant::cuda {

constexpr int64_t MOST_GEMV_TOKENS = 8, MOST_CLUSTER_TOKENS = 16, MOST_SINGLE_TOKENS = 64;
constexpr int64_t ANY = INT64_MAX;

// Devices from one capability to another, up to so many tokens, and weights of up to so many numbers.
struct Limit {
    int from, to;
    int64_t tokens, numbers, path;
};

// The first line that fits; where none does, the weights are dequantized.
constexpr Limit LIMITS[] = {
    {90, 90, MOST_GEMV_TOKENS, int64_t{1} << 27, LLMQUANT_CUDA_GEMV},
    {90, 90, 2048, ANY, LLMQUANT_CUDA_WGMMA},
    {80, 999, MOST_GEMV_TOKENS, ANY, LLMQUANT_CUDA_GEMV},
    {91, 999, 512, ANY, LLMQUANT_CUDA_GEMM},
    {80, 89, 256, ANY, LLMQUANT_CUDA_GEMM},
};

constexpr int64_t path_for(int64_t tokens, int64_t numbers, int capability) {
    for (const Limit& limit : LIMITS)
        if (limit.from <= capability && capability <= limit.to && tokens <= limit.tokens && numbers <= limit.numbers)
            return limit.path;
    return LLMQUANT_CUDA_DEQUANTIZE;
}

}  // namespace llmquant::cuda
