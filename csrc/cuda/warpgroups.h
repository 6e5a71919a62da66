// The parts that wgmma.h is put together from: what stands in shared memory, which words of the codes are a warp's
// own, and how codes become what the tensor cores multiply.
#pragma once

#include "finish.h"
#include "hopper.h"

namespace llmquant::cuda::warpgroups {

constexpr int GROUPS = 2;  // warpgroups that multiply
constexpr int CONSUMERS = GROUPS * WARPGROUP, THREADS = CONSUMERS + WARPGROUP;
constexpr int STEPS = 8, COLUMNS = STEPS * STEP;  // of a chunk
constexpr int BOX = 64, BOXES = COLUMNS / BOX;    // columns of activations that are copied at once: 128 bytes
constexpr int GRIDS = COLUMNS / 32;               // groups of a chunk, at most
constexpr int DEPTH = 4;                          // steps that are multiplied or wait for it
constexpr int ROOM = 226 * 1024;                  // of a multiprocessor

static_assert(PAD_COLUMNS % COLUMNS == 0, "chunks are whole");

// Lanes of a warp that say that a stage is free. One is enough, as it has met the others. compute-sanitizer does not
// see how they meet, which takes no instruction where all are together, and is given kernels where each says it.
#ifdef LLMQUANT_RACECHECK
constexpr int RELEASING = LANES;
#else
constexpr int RELEASING = 1;
#endif

template <int TOKENS>
constexpr int BLOCKS = TOKENS <= 16 ? 2 : 1;  // that fit a multiprocessor
// The weight's part of a block's tile, and the words of a lane that are a warp's own.
template <int TOKENS>
constexpr int TILES = TOKENS <= 128 ? 4 : 2;
template <int TOKENS>
constexpr int OWN = TILES<TOKENS> * WORDS / (GROUPS * 4);

template <int TOKENS>
struct alignas(1024) Stage {
    Words x[BOXES][TOKENS * BOX / GRANULE];
    Words codes[TILES<TOKENS>][STEPS * LANES];
    Words scales[TILES<TOKENS>][GRIDS][8];
    uint32_t zeros[TILES<TOKENS>][GRIDS][8];
};

constexpr int stages_of(int room, int bytes) { return room / bytes < 8 ? room / bytes : 8; }
template <int TOKENS>
constexpr int STAGES = stages_of(ROOM / BLOCKS<TOKENS>, sizeof(Stage<TOKENS>));

template <int TOKENS>
struct Shared {
    Stage<TOKENS> stages[STAGES<TOKENS>];
    Barrier full[STAGES<TOKENS>], empty[STAGES<TOKENS>], sent;
    int word;
};

// Where a warp stands in the ring of stages. A barrier's phase changes its parity with every round.
template <int TOKENS>
struct Place {
    int stage = 0, parity = 0;

    __device__ void advance() {
        if (++stage == STAGES<TOKENS>) {
            stage = 0;
            parity ^= 1;
        }
    }
    __device__ int before() const { return stage == 0 ? STAGES<TOKENS> - 1 : stage - 1; }
};

template <int TOKENS>
using Sums = float[OWN<TOKENS>][TOKENS / 2];
template <int TOKENS>
using Numbers = uint32_t[OWN<TOKENS>][4];  // matrices A of a step

// Where a thread stands.
template <int TOKENS>
struct Part {
    int thread = thread_index();  // of those that multiply
    int lane = thread % LANES, warp = thread / LANES % 4, group = thread / LANES / 4;
    static constexpr int COUNT = TILES<TOKENS>, EACH = OWN<TOKENS>;
    int tile = COUNT == 4 ? warp : group;
    int word = (COUNT == 4 ? group : warp) * EACH;  // the first that is its own

    // In the block's tile.
    __device__ int row(int j, int r) const { return tile * TILE + 16 * (word + j) + sum_row(lane, r); }
};

// A warp's own of four words.
template <int COUNT>
struct alignas(4 * COUNT) Few {
    uint32_t word[COUNT];
};
template <int TOKENS>
__device__ __forceinline__ Few<OWN<TOKENS>> own_of(const Words& words, const Part<TOKENS>& part) {
    return *reinterpret_cast<const Few<OWN<TOKENS>>*>(&words.word[part.word]);
}

// Of a group of columns: two scales to a word, and zeros in the low bits.
template <int TOKENS>
__device__ __forceinline__ Few<OWN<TOKENS>> scales_of(const Stage<TOKENS>& stage, const Part<TOKENS>& part, int group) {
    return own_of(stage.scales[part.tile][group][part.lane / 4], part);
}
template <bool ZEROS, int TOKENS>
__device__ __forceinline__ uint32_t zeros_of(const Stage<TOKENS>& stage, const Part<TOKENS>& part, int group) {
    return ZEROS ? stage.zeros[part.tile][group][part.lane / 4] >> 8 * part.word : MIDPOINTS;
}
template <int TOKENS>
__device__ __forceinline__ Few<OWN<TOKENS>> codes_of(const Stage<TOKENS>& stage, const Part<TOKENS>& part, int step) {
    return own_of(stage.codes[part.tile][step * LANES + part.lane], part);
}

// Matrix B of a step, from that of the stage.
template <int TOKENS>
__device__ __forceinline__ uint64_t x_of(uint64_t stage, int step) {
    return matrix_at(stage, step * STEP / BOX * TOKENS * BOX * 2 + step * STEP % BOX * 2);
}

}  // namespace llmquant::cuda::warpgroups
