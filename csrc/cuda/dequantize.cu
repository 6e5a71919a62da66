// Rows of a weight as plain numbers, for products of many tokens: the caller multiplies a slab that is still in L2.

#include "kernels.h"

namespace llmquant::cuda {
namespace {

constexpr int COLUMNS = 4 * STEP;  // that a warp takes of a tile

struct Slab {
    Weight weight;
    void* out;
    int first, count;  // rows
    bool fp16_scales;
};

// How a pair of numbers of each kind is made and stored.
struct ToFp16 {
    using Pair = uint32_t;
    static constexpr int BYTES = 2;
    static __device__ __forceinline__ Pair pair(float low, float high) { return to_pair<Fp16>(low, high); }
};
struct ToBf16 {
    using Pair = uint32_t;
    static constexpr int BYTES = 2;
    static __device__ __forceinline__ Pair pair(float low, float high) { return to_pair<Bf16>(low, high); }
};
struct ToFp32 {
    struct alignas(8) Pair {
        float low, high;
    };
    static constexpr int BYTES = 4;
    static __device__ __forceinline__ Pair pair(float low, float high) { return {low, high}; }
};

// A row in shared memory, with 8 numbers to spare: so rows begin in different banks.
template <class To>
LLMQUANT_BOTH constexpr int row_bytes() {
    return (COLUMNS + 8) * To::BYTES;
}

// 2^23 + code, less 2^23 + zero: exact, and cheaper than a conversion.
__device__ __forceinline__ float integer(uint32_t code) { return as_float(0x4b000000u | code); }

// One step of a tile: the lane's codes to shared memory, where `rows` are COLUMNS wide.
template <class To>
__device__ void dequantize_step(const Slab& slab, int tile, int step, int lane, unsigned char* rows) {
    const Layout& layout = slab.weight.layout;
    const int64_t grid = grid_at(layout.groups, tile, step >> layout.shift) / 8 + lane / 4;
    const Words words = slab.weight.codes[words_at(layout.steps, tile, step, lane)];
    const Words scales = slab.weight.scales[grid];
    const uint32_t zeros = slab.weight.zeros ? slab.weight.zeros[grid] : 0x88888888u;
    for (int j = 0; j < WORDS; ++j)
        for (int p = 0; p < 4; ++p) {
            const int position = 2 * j + p % 2;  // of this row's scale and zero
            const uint32_t bits = scales.word[j] >> 16 * (p % 2);
            const float scale = slab.fp16_scales ? to_float<Fp16>(bits) : to_float<Bf16>(bits);
            const float zero = integer(zeros >> 4 * position & 15);
            const float low = integer(words.word[j] >> 4 * p & 15) - zero;
            const float high = integer(words.word[j] >> 4 * (p + 4) & 15) - zero;
            const int column = step % (COLUMNS / STEP) * STEP + code_column(lane, p);
            *reinterpret_cast<typename To::Pair*>(rows + code_row(lane, j, p) * row_bytes<To>() + column * To::BYTES) =
                To::pair(scale * low, scale * high);
        }
}

// From shared memory to where the rows belong, 16 bytes at a time where every row begins at a multiple of that.
template <class To>
__device__ void write_rows(const Slab& slab, int tile, int begin, int lane, const unsigned char* rows) {
    const Layout& layout = slab.weight.layout;
    const int64_t stride = int64_t{layout.columns} * To::BYTES;
    const int first = tile * TILE - slab.first;
    unsigned char* out = static_cast<unsigned char*>(slab.out) + first * stride + int64_t{begin} * To::BYTES;
    const int count = min(TILE, slab.count - first), width = min(COLUMNS, layout.columns - begin);
    if (stride % 16 == 0) {
        const int pieces = COLUMNS * To::BYTES / 16;
        for (int i = lane; i < count * pieces; i += LANES) {
            const int row = i / pieces, at = i % pieces * 16;
            if (at < width * To::BYTES)
                *reinterpret_cast<Words*>(out + row * stride + at) =
                    *reinterpret_cast<const Words*>(rows + row * row_bytes<To>() + at);
        }
        return;
    }
    for (int row = 0; row < count; ++row)
        for (int at = lane * 2; at < width * To::BYTES; at += LANES * 2)
            *reinterpret_cast<uint16_t*>(out + row * stride + at) =
                *reinterpret_cast<const uint16_t*>(rows + row * row_bytes<To>() + at);
}

template <class To>
__global__ void dequantize(Slab slab) {
    const Layout& layout = slab.weight.layout;
    const int warp = thread_index() / LANES, lane = thread_index() % LANES, warps = threads_of_block() / LANES;
    const int pieces = layout.steps * STEP / COLUMNS;  // of a tile
    const int64_t piece = int64_t{block_index()} * warps + warp;
    const int tile = static_cast<int>(piece / pieces) + slab.first / TILE,
              begin = static_cast<int>(piece % pieces) * COLUMNS;
    if (tile * TILE >= slab.first + slab.count || begin >= layout.columns) return;  // the whole warp
    unsigned char* rows = shared_memory() + warp * TILE * row_bytes<To>();
    for (int step = begin / STEP; step < begin / STEP + COLUMNS / STEP; ++step)
        dequantize_step<To>(slab, tile, step, lane, rows);
    sync_warp();
    write_rows<To>(slab, tile, begin, lane, rows);
}

template <class To>
int64_t start(const Slab& slab, void* stream) {
    const int warps = 8 / To::BYTES;  // so that they need less than 48 KB
    const int64_t tiles = rounded_up(slab.count, TILE) / TILE;
    const int64_t pieces = tiles * (slab.weight.layout.steps * STEP / COLUMNS);
    return launch(dequantize<To>,
                  {rounded_up(pieces, warps) / warps, warps * LANES, warps * TILE * row_bytes<To>(), false, stream},
                  slab);
}

}  // namespace

int64_t start_dequantize(const LlmquantCudaWeight& weight, int64_t first, int64_t count, int64_t kind, void* out,
                         void* stream) {
    const Slab slab = {weight_of(weight), out, static_cast<int>(first), static_cast<int>(count),
                       weight.scale_kind == LLMQUANT_CUDA_FP16};
    switch (kind) {
        case LLMQUANT_CUDA_FP16:
            return start<ToFp16>(slab, stream);
        case LLMQUANT_CUDA_BF16:
            return start<ToBf16>(slab, stream);
        default:
            return start<ToFp32>(slab, stream);
    }
}

}  // namespace llmquant::cuda
