// Products with INT4 and INT8 weights on the CPU.
//
//   y[t][r] = bias[r] + sum_i x[t][i] * scales[r][i / group] * (codes[r][i] - zeros[r][i / group])
//
// A weight stands in panels of 16 rows, filled up with rows of zeros. A panel is a sequence of 64-byte steps, 4 bytes
// to a row: with 4 bits a step is 8 columns, columns 0..3 in the low nibbles and 4..7 in the high ones; with 8 bits it
// is 4 columns. Columns are filled up to a multiple of 32. So a step is one vector that is multiplied as it is loaded,
// and a thread reads one stream of memory. Scales and zeros stand likewise, 16 rows to a group.
//
// Activations become integers, block by block with a scale of their own: one plane of 8 bits, or two of 8 that make 15.
#pragma once

#include <cstdint>

#include "levels.h"

#define LLMQUANT_PANEL 16        // rows
#define LLMQUANT_CHUNK 32        // columns: every group and block is whole chunks
#define LLMQUANT_TILE 16         // tokens, of 64 columns each: what AMX multiplies at once
#define LLMQUANT_BLOCK_MOST 128  // columns whose activations share a scale, where a group has more

enum : int64_t { LLMQUANT_BF16, LLMQUANT_FP16, LLMQUANT_FP32 };  // kinds of numbers

// Mirrored in llmquant/kernels/cpu.py; a change of either needs a new value of llmquant_abi.
struct LlmquantLinear {
    const void* x;         // [tokens][columns]
    const uint8_t* codes;  // [panels][steps][16][4]
    const void* scales;    // [panels][ceil(columns / group)][16]
    const uint8_t* zeros;  // like scales; null: 2^(bits - 1) everywhere
    const void* bias;      // [rows]; null: none
    void* y;               // [tokens][rows] like x
    int64_t tokens, rows, columns;
    int64_t group;   // columns that share a scale: a multiple of 32, or all
    int64_t bits;    // 4 or 8
    int64_t planes;  // 1 or 2
    int64_t x_kind, scale_kind, bias_kind;
    int64_t threads;  // at most; at least 1
    int64_t level;    // instruction set: an index of llmquant_level
};

// 0, or 1 if there is no memory for the integers of x.
LLMQUANT_EXPORT int64_t llmquant_linear(const LlmquantLinear* task);

namespace llmquant {

// x in integers: x[t][i] = scale[t][i / block] * integer, and the sum of each block's integers. With two planes, an
// integer is 128 * the first + the second.
struct Integers {
    int8_t* planes;  // [tokens][planes][padded], or in the order of tiles.cpp
    float* scales;   // [tokens][blocks]
    int32_t* sums;   // [tokens][blocks]
};  // with room for whole tiles of tokens, and of columns

constexpr int64_t bytes_of(int64_t kind) { return kind == LLMQUANT_FP32 ? 4 : 2; }
constexpr int64_t padded(int64_t columns) { return (columns + LLMQUANT_CHUNK - 1) / LLMQUANT_CHUNK * LLMQUANT_CHUNK; }
// Columns whose activations share a scale: those of a group, if they are whole chunks and not too many.
constexpr int64_t block_of(const LlmquantLinear& task) {
    return task.group % LLMQUANT_CHUNK == 0 && task.group <= LLMQUANT_BLOCK_MOST ? task.group : LLMQUANT_BLOCK_MOST;
}
constexpr int64_t panels_of(const LlmquantLinear& task) { return (task.rows + LLMQUANT_PANEL - 1) / LLMQUANT_PANEL; }
constexpr int64_t blocks_of(const LlmquantLinear& task) { return (task.columns + block_of(task) - 1) / block_of(task); }

}  // namespace llmquant
