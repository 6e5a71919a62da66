// Which path computes a product: a table, measured on an H100 (docs/results) for sm_90, and guessed for the others.
#pragma once

#include "llmquant_cuda.h"

namespace llmquant::cuda {

constexpr int64_t MOST_GEMV_TOKENS = 8, MOST_SINGLE_TOKENS = 64;
constexpr int64_t ANY = INT64_MAX;

// Devices from one capability to another, up to so many tokens, and, of what is only for that, products whose tiles are
// all computed at once. By another path, whose blocks add up their sums in clusters, if that leaves no block more than
// `longer` chunks longer to work: by so much less time the sums take.
struct Choice {
    int from, to;
    int64_t tokens;
    bool at_once;
    int64_t path, in_clusters;
    int longer;
};

// The first that serves; where none does, the weights are dequantized.
constexpr Choice CHOICES[] = {
    // from, to, tokens, at_once, path, in_clusters, longer
    {90, 90, MOST_GEMV_TOKENS, false, LLMQUANT_CUDA_GEMV, LLMQUANT_CUDA_CLUSTER, 8},
    {90, 90, MOST_SINGLE_TOKENS, false, LLMQUANT_CUDA_WGMMA, LLMQUANT_CUDA_SPLIT, 4},
    {90, 90, ANY, true, LLMQUANT_CUDA_WGMMA, LLMQUANT_CUDA_SPLIT, 4},
    {90, 90, ANY, false, LLMQUANT_CUDA_PAIRS, 0, 0},
    {80, 999, MOST_GEMV_TOKENS, false, LLMQUANT_CUDA_GEMV, 0, 0},
    {91, 999, 512, false, LLMQUANT_CUDA_GEMM, 0, 0},
    {80, 89, 256, false, LLMQUANT_CUDA_GEMM, 0, 0},
};

}  // namespace llmquant::cuda
