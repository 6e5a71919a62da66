// Panels of a weight, a vector at a time. See linear.h.
#pragma once

#include "numbers.h"

namespace llmquant {
namespace {

constexpr int64_t PANEL = LLMQUANT_PANEL;
constexpr int64_t CHUNK = LLMQUANT_CHUNK;
constexpr int V = PANEL / LANES;     // vectors in a step
constexpr int64_t STEP = 4 * PANEL;  // bytes

inline Int low_nibbles(Int bytes) { return bytes & 0x0f0f0f0f; }
inline Int high_nibbles(Int bytes) { return bytes >> 4 & 0x0f0f0f0f; }

// Bytes of a panel from its start to a column.
template <int BITS>
constexpr int64_t offset(int64_t column) {
    return column * PANEL * BITS / 8;
}

// The scales and zero points of one group of a panel, the rows of vector v.
struct Grid {
    static int64_t at(const LlmquantLinear& task, int64_t panel, int64_t group, int v) {
        return (panel * ceil_div(task.columns, task.group) + group) * PANEL + v * LANES;
    }

    static Float scale(const LlmquantLinear& task, int64_t panel, int64_t group, int v) {
        const int64_t from = at(task, panel, group, v);
        if (task.scale_kind == LLMQUANT_FP32) return load<Float>(static_cast<const float*>(task.scales) + from);
        return from_half(static_cast<const uint16_t*>(task.scales) + from, task.scale_kind);
    }

    static Int zero(const LlmquantLinear& task, int64_t panel, int64_t group, int v) {
        return task.zeros ? widen(task.zeros + at(task, panel, group, v)) : Int{} + (1 << (task.bits - 1));
    }
};

// The results of one token with the rows of a panel, bias added.
inline void write_panel(const LlmquantLinear& task, const Float (&values)[V], int64_t token, int64_t panel) {
    const int64_t row = panel * PANEL, count = min(PANEL, task.rows - row);
    float lanes[PANEL], bias[PANEL] = {};
    if (task.bias) read(task.bias, task.bias_kind, row, count, bias);
    for (int v = 0; v < V; ++v) store(lanes + v * LANES, values[v] + load<Float>(bias + v * LANES));
    write(lanes, task.y, task.x_kind, token * task.rows + row, count);
}

}  // namespace
}  // namespace llmquant
