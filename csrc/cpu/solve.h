// The inner loops of GPTQ, of coordinate descent and of the scale search.
//
// The weight stands transposed: a column of it is one contiguous row here, and rows of the weight are lanes.
#pragma once

#include <cstdint>

#include "levels.h"

// At most this many columns are rounded in one call, so that a tile of them fits the first-level cache.
#define LLMQUANT_BLOCK 128
#define LLMQUANT_CANDIDATES 128

// A grid to try: the range of the group, its ends multiplied by `low` and `high`. `sign` is 1, or -1 for a symmetric
// grid with a negative scale: its longer side, of 2^(bits - 1) steps, is then up and not down.
struct LlmquantCandidate {
    float low, high, sign;
};

// Mirrored in llmquant/solve/native.py; a change of either needs a new value of llmquant_abi.
struct LlmquantColumns {
    float* work;          // [columns][rows]; rounding replaces it by the errors, descent by the steps
    const float* matrix;  // [columns][stride]: only what is right of the diagonal is read
    const float* pivots;  // [columns]: what an error (rounding) or a gradient (descent) is multiplied by
    float* scales;        // [ceil(columns / group)][rows]
    float* zeros;         // like scales
    uint8_t* codes;       // [columns][rows]; descent starts from them
    const LlmquantCandidate* candidates;  // null: the grids are given
    int64_t candidate_count;              // at most LLMQUANT_CANDIDATES
    int64_t rows, columns, stride;
    int64_t group;  // columns that share a grid; where a grid is searched for, a multiple of 8
    int64_t bits, symmetric, descend, threads, level;
};

// Rounding, column after column:  v_j = round(w_j / s), e_j = (w_j - s v_j) pivots_j, w_l -= e_j matrix_jl for l > j.
// With candidates, each group takes the grid on which this loses least, sum of e_j^2 over the group.
// Descent, from q = s (codes - zero) and its gradient r:  q'_j = s round((q_j + r_j pivots_j) / s), r_l -= (q'_j - q_j)
// matrix_jl for l > j.
LLMQUANT_EXPORT void llmquant_round_columns(const LlmquantColumns* task);

// Each group takes the grid that has the least  sum_j ((w_j - Q(w_j)) pivots_j)^2.  Columns and group of any size;
// `matrix` and `codes` are not read.
LLMQUANT_EXPORT void llmquant_search_grids(const LlmquantColumns* task);
