// Where everything stands: index functions that the kernels share with nothing but arithmetic, for host and device.
//
// Notation: a tile is 64 rows, a step is 16 columns, a lane is one of the 32 threads of a warp. A tile's codes for one
// step are 512 bytes, 16 to a lane: 4 words of 8 nibbles. A word is just what a lane holds of the 16 x 16 matrix A of
// mma.m16n8k16 (PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type"), so weights go from memory to
// the tensor cores without a shuffle: rows of the weight are rows of A, tokens are columns of B.
//
// Inside of a step this is the order of Marlin (Frantar et al., arXiv 2408.11743), but for two nibbles that change
// places, so that a nibble's place in its byte says which of two rows it belongs to. Steps of one tile follow each
// other: a warp that walks along the columns reads one stream.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LLMQUANT_BOTH __host__ __device__
#else
#define LLMQUANT_BOTH
#endif

namespace llmquant::cuda {

constexpr int LANES = 32;
constexpr int TILE = 64;    // rows
constexpr int STEP = 16;    // columns
constexpr int WORDS = 4;    // of a lane and step
constexpr int GRANULE = 8;  // 16-bit numbers in 16 bytes, the most that a thread moves at once
// A weight is filled up to multiples of these, so that no kernel meets half a tile of its own.
constexpr int PAD_ROWS = 128;
constexpr int PAD_COLUMNS = 128;

LLMQUANT_BOTH constexpr int64_t rounded_up(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

// The sizes of a packed weight. Groups are those of the filled-up columns.
struct Layout {
    int rows, columns, tiles, steps, groups;
    int shift;  // step >> shift is the group of a step
};

constexpr Layout layout_of(int64_t rows, int64_t columns, int64_t group) {
    const int tiles = static_cast<int>(rounded_up(rows, PAD_ROWS) / TILE);
    const int steps = static_cast<int>(rounded_up(columns, PAD_COLUMNS) / STEP);
    int shift = 1;
    while (shift < 30 && (group >= columns || int64_t{STEP} << shift < group)) ++shift;
    return {static_cast<int>(rows), static_cast<int>(columns), tiles, steps, ((steps - 1) >> shift) + 1, shift};
}

// Index of what a lane loads of a tile and step, in units of 16 bytes.
LLMQUANT_BOTH constexpr int64_t words_at(int steps, int tile, int step, int lane) {
    return (int64_t{tile} * steps + step) * LANES + lane;
}

// Nibble p of word j of a lane: its row in the tile and its column in the step.
LLMQUANT_BOTH constexpr int code_row(int lane, int j, int p) { return 16 * j + 8 * (p % 2) + lane / 4; }
LLMQUANT_BOTH constexpr int code_column(int lane, int p) { return 2 * (lane % 4) + 8 * (p % 4 / 2) + p / 4; }

// Scales and zeros of a tile and group stand in this order: the rows of lane / 4, which are 8, then those of the next.
// So a lane's scales are 16 bytes, and its zeros are one word.
LLMQUANT_BOTH constexpr int64_t grid_at(int groups, int tile, int group) {
    return (int64_t{tile} * groups + group) * TILE;
}
LLMQUANT_BOTH constexpr int grid_row(int position) {
    return 16 * (position % 8 / 2) + 8 * (position % 2) + position / 8;
}

// What a lane holds of C, 16 rows and 8 tokens: register r.
LLMQUANT_BOTH constexpr int sum_row(int lane, int r) { return lane / 4 + 8 * (r / 2); }
LLMQUANT_BOTH constexpr int sum_token(int lane, int r) { return 2 * (lane % 4) + r % 2; }

// Activations stand in shared memory by tokens, in rows of `granules` (a multiple of 8) granules. A granule of the same
// columns stands in another place for each of 8 tokens, so that ldmatrix finds all 8 in different banks.
LLMQUANT_BOTH constexpr int activations_at(int granules, int token, int granule) {
    return token * granules + (granule ^ (token & 7));
}
// ldmatrix.x4 takes the address of row `lane % 8` of 8 x 8 matrix `lane / 8`. The matrices are here: granule 0 and 1 of
// a step, then those of the next 8 tokens (gemm); or the 4 granules of two steps (gemv).
LLMQUANT_BOTH constexpr int gemm_matrix_token(int lane) { return lane / 16 * 8 + lane % 8; }
LLMQUANT_BOTH constexpr int gemm_matrix_granule(int lane) { return lane / 8 % 2; }
LLMQUANT_BOTH constexpr int gemv_matrix_token(int lane) { return lane % 8; }
LLMQUANT_BOTH constexpr int gemv_matrix_granule(int lane) { return lane / 8; }

// Codes become numbers by bit operations, two at a time: nibbles r and r + 4 of a word are register r of A, which has
// rows 8 (r % 2) on and columns 8 (r / 2) on. Shifted and masked, a code stands in bits 0..3 of 16, or in bits 4..7.
LLMQUANT_BOTH constexpr int code_shift(int r) { return 8 * (r / 2); }
LLMQUANT_BOTH constexpr uint32_t code_mask(int r) { return r % 2 ? 0x00f000f0u : 0x000f000fu; }

// fp16 has 10 bits of mantissa. A code written into that of 1024 is 1024 + code, or 1024 + 16 code, and `factor` times
// that, less what is too much, is the code less its zero: exactly. (Kim et al., arXiv 2211.10017.)
struct Fp16 {
    static constexpr uint32_t ONE = 0x3c003c00, SIXTEENTH = 0x2c002c00, BASE = 0x64006400;
    LLMQUANT_BOTH static constexpr uint32_t factor(int r) { return r % 2 ? SIXTEENTH : ONE; }
    static constexpr float WORTH = 1;  // of a code, by how much that is too small
};

// bf16 has 7, which is one too few for a code in bits 4..7. But 16 bits below 256 are, as a bf16, themselves times
// 2^-133: the numbers below 2^-126 have no leading one, and those from there to 2^-125 are as far apart. So a code
// needs no base at all, and since nothing is too much, a scale and its zero can be had in the same multiplication: see
// Scaling in finish.h. 2^127 is the largest power of two; that leaves 2^-6.
struct Bf16 {
    static constexpr uint32_t BASE = 0;
    LLMQUANT_BOTH static constexpr uint32_t factor(int r) { return r % 2 ? 0x7d007d00u : 0x7f007f00u; }  // 2^123, 2^127
    static constexpr float WORTH = 64;
};

}  // namespace llmquant::cuda
