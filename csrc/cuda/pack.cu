// Between codes in rows and the layout of the kernels, both ways. Done once for each weight: a thread makes one word,
// and its reads are scattered.

#include "kernels.h"

namespace llmquant::cuda {
namespace {

constexpr int THREADS = 256;

int64_t blocks_for(int64_t items) { return rounded_up(items, THREADS) / THREADS; }

struct Codes {
    uint32_t* words;
    uint8_t* codes;
    Layout layout;
};

struct Place {
    int row, column;
};

__device__ __forceinline__ int64_t item_index() { return int64_t{block_index()} * THREADS + thread_index(); }

// Where nibble p of a word stands in the weight; outside of it, if the word fills up.
__device__ __forceinline__ Place place_of(const Layout& layout, int64_t word, int p) {
    const int j = static_cast<int>(word % WORDS), lane = static_cast<int>(word / WORDS % LANES);
    const int64_t step = word / (WORDS * LANES);
    return {static_cast<int>(step / layout.steps) * TILE + code_row(lane, j, p),
            static_cast<int>(step % layout.steps) * STEP + code_column(lane, p)};
}

__device__ __forceinline__ bool inside(const Layout& layout, const Place& place) {
    return place.row < layout.rows && place.column < layout.columns;
}

__global__ void pack_codes(Codes task) {
    const int64_t index = item_index();
    if (index >= int64_t{task.layout.tiles} * task.layout.steps * WORDS * LANES) return;
    uint32_t word = 0;
    for (int p = 0; p < 8; ++p) {
        const Place place = place_of(task.layout, index, p);
        if (inside(task.layout, place))
            word |= (task.codes[int64_t{place.row} * task.layout.columns + place.column] & 15u) << 4 * p;
    }
    task.words[index] = word;
}

__global__ void unpack_codes(Codes task) {
    const int64_t index = item_index();
    if (index >= int64_t{task.layout.tiles} * task.layout.steps * WORDS * LANES) return;
    for (int p = 0; p < 8; ++p) {
        const Place place = place_of(task.layout, index, p);
        if (inside(task.layout, place))
            task.codes[int64_t{place.row} * task.layout.columns + place.column] = task.words[index] >> 4 * p & 15;
    }
}

struct Grids {
    uint16_t* packed_scales;
    uint32_t* packed_zeros;
    float* scales;
    uint8_t* zeros;
    Layout layout;
    int groups;  // of the weight itself, without those that fill up
    int64_t scale_kind;
};

// Where position p of a tile and group stands among [rows][groups], or -1.
__device__ __forceinline__ int64_t grid_place(const Grids& task, int64_t index, int p) {
    const int64_t block = index / TILE;
    const int group = static_cast<int>(block % task.layout.groups);
    const int row = static_cast<int>(block / task.layout.groups) * TILE + grid_row(p);
    return row < task.layout.rows && group < task.groups ? int64_t{row} * task.groups + group : -1;
}

__global__ void pack_grids(Grids task) {
    const int64_t index = item_index();
    if (index >= int64_t{task.layout.tiles} * task.layout.groups * TILE) return;
    const int64_t place = grid_place(task, index, static_cast<int>(index % TILE));
    const float scale = place < 0 ? 0 : task.scales[place];
    const uint32_t pair = task.scale_kind == LLMQUANT_CUDA_FP16 ? to_pair<Fp16>(scale, 0) : to_pair<Bf16>(scale, 0);
    task.packed_scales[index] = static_cast<uint16_t>(pair);
    if (!task.packed_zeros || index % 8) return;
    uint32_t word = 0;
    for (int p = 0; p < 8; ++p) {
        const int64_t at = grid_place(task, index, static_cast<int>(index % TILE) + p);
        if (at >= 0) word |= (task.zeros[at] & 15u) << 4 * p;
    }
    task.packed_zeros[index / 8] = word;
}

__global__ void unpack_grids(Grids task) {
    const int64_t index = item_index();
    if (index >= int64_t{task.layout.tiles} * task.layout.groups * TILE) return;
    const int64_t place = grid_place(task, index, static_cast<int>(index % TILE));
    if (place < 0) return;
    const uint32_t bits = task.packed_scales[index];
    task.scales[place] = task.scale_kind == LLMQUANT_CUDA_FP16 ? to_float<Fp16>(bits) : to_float<Bf16>(bits);
    task.zeros[place] = task.packed_zeros ? task.packed_zeros[index / 8] >> 4 * (index % 8) & 15 : 8;
}

Codes codes_of(const LlmquantCudaWeight& weight, const uint8_t* codes) {
    return {static_cast<uint32_t*>(weight.codes), const_cast<uint8_t*>(codes), weight_of(weight).layout};
}

Grids grids_of(const LlmquantCudaWeight& weight, const float* scales, const uint8_t* zeros) {
    const int64_t width = weight.group < weight.columns ? weight.group : weight.columns;
    return {static_cast<uint16_t*>(weight.scales),
            static_cast<uint32_t*>(weight.zeros),
            const_cast<float*>(scales),
            const_cast<uint8_t*>(zeros),
            weight_of(weight).layout,
            static_cast<int>((weight.columns + width - 1) / width),
            weight.scale_kind};
}

int64_t start(void (*of_codes)(Codes), void (*of_grids)(Grids), const Codes& codes, const Grids& grids, void* stream) {
    const Layout& layout = codes.layout;
    const int64_t words = int64_t{layout.tiles} * layout.steps * WORDS * LANES;
    const int64_t positions = int64_t{layout.tiles} * layout.groups * TILE;
    const int64_t error = launch(of_codes, {blocks_for(words), THREADS, 0, false, stream}, codes);
    return error ? error : launch(of_grids, {blocks_for(positions), THREADS, 0, false, stream}, grids);
}

}  // namespace

int64_t start_pack(const LlmquantCudaWeight& weight, const uint8_t* codes, const float* scales, const uint8_t* zeros,
                   void* stream) {
    return start(pack_codes, pack_grids, codes_of(weight, codes), grids_of(weight, scales, zeros), stream);
}

int64_t start_unpack(const LlmquantCudaWeight& weight, uint8_t* codes, float* scales, uint8_t* zeros, void* stream) {
    return start(unpack_codes, unpack_grids, codes_of(weight, codes), grids_of(weight, scales, zeros), stream);
}

}  // namespace llmquant::cuda
