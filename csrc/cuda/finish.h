// How a product ends, in gemv.cu and gemm.cu alike: who adds up a shared tile, and what is added to it.
#pragma once

#include "kernels.h"

namespace llmquant::cuda {

// Whether this block is the last of those that share the tile, all of whose sums then stand in the workspace; the
// calling block's own included, which it has just written. Called by all threads that `sync` is a barrier of; `word`
// is theirs, in shared memory.
template <class Sync>
__device__ __forceinline__ bool is_last(const Product& product, int tile, int ticket, int* word, Sync sync) {
    const Schedule& schedule = product.schedule;
    sync();
    if (thread_index() == 0) {
        const int others = last_block(schedule, tile) - first_block(schedule, tile);
        fence();  // what all threads have written, before the ticket
        *word = draw_ticket(product.tickets + ticket, static_cast<uint32_t>(others));
        fence();  // the ticket, before what the others have written
    }
    sync();
    return *word != 0;
}
__device__ __forceinline__ bool is_last(const Product& product, int tile, int* word) {
    return is_last(product, tile, tile, word, [] { sync_block(); });
}

__device__ __forceinline__ float bias_at(const Product& product, int row) {
    if (!product.bias) return 0;
    if (product.bias_kind == LLMQUANT_CUDA_FP32) return static_cast<const float*>(product.bias)[row];
    const uint32_t bits = static_cast<const uint16_t*>(product.bias)[row];
    return product.bias_kind == LLMQUANT_CUDA_FP16 ? to_float<Fp16>(bits) : to_float<Bf16>(bits);
}

// Starts the copy of the granule of x that begins at a column; past the last column there are zeros.
__device__ __forceinline__ void copy_granule(const Product& product, int token, int column, Words* to) {
    const int bytes = max(0, min(16, 2 * (product.weight.layout.columns - column)));
    copy_async(to, bytes ? product.x + token * product.x_stride + column : product.x, bytes);
}

// The two scales of word j of a lane, or its two zeros: those of its rows, and of the rows 8 further down.
template <class T>
__device__ __forceinline__ float scale_of(const Words& scales, int j, int b) {
    return to_float<T>(scales.word[j] >> 16 * b);
}
template <class T>
__device__ __forceinline__ Offsets offsets_of(uint32_t zeros, int j, int b) {
    return T::offsets(zeros >> 4 * (2 * j + b) & 15);
}

// Matrix A of one word: codes less zeros, exactly.
template <class T>
__device__ __forceinline__ void to_weights(uint32_t word, uint32_t zeros, int j, uint32_t (&a)[4]) {
    const Offsets offsets[2] = {offsets_of<T>(zeros, j, 0), offsets_of<T>(zeros, j, 1)};
#pragma unroll
    for (int r = 0; r < 4; ++r)
        a[r] = fma2<T>(merge(word >> T::shift(r), T::mask(r), T::BASE), T::factor(r), T::offset(offsets[r % 2], r));
}

constexpr uint32_t MIDPOINTS = 0x88888888;  // the zeros of a symmetric weight

}  // namespace llmquant::cuda
