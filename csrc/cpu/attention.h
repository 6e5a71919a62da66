// Causal attention on the CPU.
//
//   out[t] = sum_s p[t][s] v[s],   p[t] = softmax over s <= t + keys - queries of scale * <q[t], k[s]>
//
// The queries are the last positions of the keys. Several heads of q share one of k and v where there are fewer of
// those.
#pragma once

#include <cstdint>

#include "levels.h"

// Mirrored in llmquant/kernels/cpu.py; a change of either needs a new value of llmquant_abi.
struct LlmquantAttention {
    const void* q;  // [batch][heads][queries][qk_width], with strides
    const void* k;  // [batch][kv_heads][keys][qk_width]
    const void* v;  // [batch][kv_heads][keys][v_width]
    void* out;      // [batch][queries][heads][v_width], contiguous
    int64_t batch, heads, kv_heads, queries, keys, qk_width, v_width;
    int64_t q_strides[3], k_strides[3], v_strides[3];  // numbers between batches, heads, positions
    int64_t kind;                                      // of all numbers
    float scale;
    int64_t threads;  // at most; at least 1
    int64_t level;    // instruction set: an index of llmquant_level
};

// 0, or 1 if there is no memory to work in.
LLMQUANT_EXPORT int64_t llmquant_attention(const LlmquantAttention* task);
