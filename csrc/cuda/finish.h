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
__device__ __forceinline__ uint32_t zero_of(uint32_t zeros, int j, int b) { return zeros >> 4 * (2 * j + b) & 15; }

constexpr uint32_t MIDPOINTS = 0x88888888;   // the zeros of a symmetric weight
constexpr uint32_t MINUS_ZERO = 0x80008000;  // what changes no product that it is added to

// What is added to `factor` times the bits of a code in rows of that b: it takes off the base, and the zero.
template <class T>
__device__ __forceinline__ uint32_t offset_of(uint32_t zero, int b);
template <>
__device__ __forceinline__ uint32_t offset_of<Fp16>(uint32_t zero, int b) {
    return b ? 0xd400d400 | zero * 0x00100010 : 0xe400e400 | zero * 0x00010001;  // -(64 + zero), -(1024 + zero)
}
template <>
__device__ __forceinline__ uint32_t offset_of<Bf16>(uint32_t zero, int) {
    const float offset = as_float(0x4b000000 | zero) * -0x1p-6f + 0x1p17f;  // -zero / 64, from 2^23 + zero
    return pick_bytes(float_bits(offset), 0x3232);
}

template <class T>
__device__ __forceinline__ uint32_t bits_of(uint32_t word, int r) {
    return merge(word >> code_shift(r), code_mask(r), T::BASE);
}

// Matrix A of one word: codes less zeros, exactly, but by WORTH too small.
template <class T>
__device__ __forceinline__ void to_integers(uint32_t word, uint32_t zeros, int j, uint32_t (&a)[4]) {
    const uint32_t offsets[2] = {offset_of<T>(zero_of(zeros, j, 0), 0), offset_of<T>(zero_of(zeros, j, 1), 1)};
#pragma unroll
    for (int r = 0; r < 4; ++r) a[r] = fma2<T>(bits_of<T>(word, r), T::factor(r), offsets[r % 2]);
}

// How the codes of a word become weights: with scale and zero, rounded once, but by WORTH too small.
template <class T, bool ZEROS>
struct Scaling {
    static constexpr float WORTH = T::WORTH;
    uint32_t offsets[2], scales[2];

    // Of word j, from the word of its two scales.
    __device__ __forceinline__ void set(uint32_t two, uint32_t zeros, int j) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
            offsets[b] = offset_of<T>(zero_of(zeros, j, b), b);
            scales[b] = pick_bytes(two, b ? 0x3232 : 0x1010);
        }
    }
    __device__ __forceinline__ void apply(uint32_t word, uint32_t (&a)[4]) const {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const uint32_t integers = fma2<T>(bits_of<T>(word, r), T::factor(r), offsets[r % 2]);
            a[r] = fma2<T>(integers, scales[r % 2], MINUS_ZERO);
        }
    }
};

// In bf16 the bits of a code are nothing but the code, and 8 scales are exact: so scale (code - 8) is one
// multiplication. 2^112 leaves room for scales below 2^16.
template <>
struct Scaling<Bf16, false> {
    static constexpr float WORTH = 0x1p21f;
    uint32_t factors[2], offsets[2];

    __device__ __forceinline__ void set(uint32_t two, uint32_t, int) {
        constexpr uint32_t UP[2] = {0x77807780, 0x75807580}, DOWN = 0xb680b680;  // 2^112, 2^108; -8 2^-21
#pragma unroll
        for (int b = 0; b < 2; ++b) {
            const uint32_t scale = pick_bytes(two, b ? 0x3232 : 0x1010);
            factors[b] = fma2<Bf16>(scale, UP[b], MINUS_ZERO);
            offsets[b] = fma2<Bf16>(scale, DOWN, MINUS_ZERO);
        }
    }
    __device__ __forceinline__ void apply(uint32_t word, uint32_t (&a)[4]) const {
#pragma unroll
        for (int r = 0; r < 4; ++r) a[r] = fma2<Bf16>(bits_of<Bf16>(word, r), factors[r % 2], offsets[r % 2]);
    }
};

}  // namespace llmquant::cuda
