// A single token on its way through a model of the Llama family, and the product with a dense weight that it ends in.
//
//   h += out(attention(rope(q(n)), rope(k(n)), v(n))),  n = norm(h);     h += down(silu(gate(m)) * up(m)),  m = norm(h)
//
// with norm(h) = gain * h / sqrt(mean(h^2) + eps). Every linear is a packed one. The state is fp32 throughout.
#pragma once

#include <cstdint>

#include "levels.h"
#include "linear.h"

// Both mirrored in llmquant/kernels/decode.py; a change of either needs a new value of llmquant_abi.
struct LlmquantLayer {
    LlmquantLinear q, k, v, out, gate, up, down;  // weights and sizes: x, y, their kind and tokens are not read
    const void* attention_gain;                   // [hidden], of the norm before attention
    const void* mlp_gain;                         // [hidden], of the norm before gate and up
    void* keys;                                   // [kv_heads][capacity][head_width], rotated
    void* values;                                 // likewise
};

struct LlmquantStep {
    const LlmquantLayer* layers;
    const void* final_gain;  // [hidden]
    const float* cosines;    // [head_width], of this position
    const float* sines;
    void* state;  // [hidden]: the embedding of the token, replaced by the normed state after the last layer
    int64_t layer_count, hidden, ffn, heads, kv_heads;
    int64_t head_width;  // a multiple of 16
    int64_t before;      // keys and values that are there; those of this token are put behind them
    int64_t capacity;    // more than `before`
    int64_t kind;        // of the state, the gains, keys and values
    float eps, scale;
    int64_t threads, level;
};

// 0, or 1 if there is no memory to work in.
LLMQUANT_EXPORT int64_t llmquant_decode(const LlmquantStep* step);

namespace llmquant {

// What attention reads and writes of a token: rows of whole heads.
struct TokenHeads {
    const float *q, *k, *v;
    float* out;
};

}  // namespace llmquant

// y[t][r] = sum_i x[t][i] w[r][i], for few tokens: the weight is read once.
struct LlmquantDense {
    const void* x;  // [tokens][columns]
    const void* w;  // [rows][columns]
    void* y;        // [tokens][rows]
    int64_t tokens, rows, columns;
    int64_t kind;  // of all numbers
    int64_t threads, level;
};

LLMQUANT_EXPORT void llmquant_dense(const LlmquantDense* task);
