// Products with INT4 and INT8 weights on the CPU.
//
//   y[t][r] = bias[r] + sum_i x[t][i] * scales[r][i / group] * (codes[r][i] - zeros[r][i / group])
//
// A row of codes takes ceil(columns * bits / 8) bytes, the low nibble first. Everything else is dense and row-major.
#pragma once

#include <cstdint>

#include "levels.h"

// Mirrored in llmquant/kernels/cpu.py; a change of either needs a new value of llmquant_abi.
struct LlmquantLinear {
    const float* x;        // [tokens][columns]; llmquant_dequantize does not read it
    const uint8_t* codes;  // [rows][ceil(columns * bits / 8)]
    const float* scales;   // [rows][ceil(columns / group)]
    const uint8_t* zeros;  // like scales; null: 2^(bits - 1) everywhere
    const float* bias;     // [rows]; null: none
    float* y;              // [tokens][rows]; of llmquant_dequantize [rows][columns]
    int64_t tokens, rows, columns;
    int64_t group;    // columns that share a scale: a multiple of 32, or all
    int64_t bits;     // 4 or 8
    int64_t threads;  // at most; at least 1
    int64_t level;    // instruction set: an index of llmquant_level
};

// 0, or 1 if there is no memory for the arranged copy of x.
LLMQUANT_EXPORT int64_t llmquant_linear(const LlmquantLinear* task);
LLMQUANT_EXPORT void llmquant_dequantize(const LlmquantLinear* task);
