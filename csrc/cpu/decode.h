// The next tokens of some sequences on their way through a model of the Llama family, and the product with a dense
// weight that it ends in.
//
//   h += out(attention(rope(q(n)), rope(k(n)), v(n))),  n = norm(h);     h += down(silu(gate(m)) * up(m)),  m = norm(h)
//
// with norm(h) = gain * h / sqrt(mean(h^2) + eps); heads of q and k may have such a norm, too. In a mixture of experts
// h += sum of weight * down(silu(gate(m)) * up(m)) over the experts that a router chooses for m. Every linear is a
// packed one, but for the router. The states are fp32 throughout. What a token becomes does not depend on the sequences
// beside it.
#pragma once

#include <cstdint>

#include "levels.h"
#include "linear.h"

#define LLMQUANT_HEADS_TOGETHER 4  // at most: query heads for which a key is read once

// These four are mirrored in llmquant/kernels/decode.py; a change of any needs a new value of llmquant_abi.

// Experts, all of the same sizes. A token's are those with the largest scores router * m, of which the softmax over all
// experts, or over those that are chosen, is their weight.
struct LlmquantMixture {
    const void* router;             // [count][hidden]
    const LlmquantLinear* experts;  // [count][3]: gate, up and down of each, as those of a layer
    int64_t count;                  // 0: there are none, and the layer's own gate, up and down are meant
    int64_t chosen;                 // by each token
    int64_t normalized;             // 1: the weights of those chosen add up to one
};

struct LlmquantLayer {
    LlmquantLinear q, k, v, out, gate, up, down;  // weights and sizes: x, y, their kind and tokens are not read
    LlmquantMixture mixture;                      // in the place of gate, up and down
    const void* attention_gain;                   // [hidden], of the norm before attention
    const void* mlp_gain;                         // [hidden], of the norm before gate and up
    const void* q_gain;  // [head_width], of a norm of each head of q before it is rotated; null: there is none
    const void* k_gain;  // likewise of k
};

struct LlmquantSequence {
    void* const* keys;     // of each layer, [kv_heads][capacity][head_width], rotated
    void* const* values;   // likewise
    const float* cosines;  // [head_width], of the token's position
    const float* sines;
    int64_t before;    // keys and values that are there; those of the token are put behind them
    int64_t capacity;  // more than `before`
};

struct LlmquantStep {
    const LlmquantLayer* layers;
    const LlmquantSequence* sequences;
    const void* final_gain;  // [hidden]
    void* states;  // [sequence_count][hidden]: embeddings of tokens, replaced by normed states after the last layer
    int64_t layer_count, sequence_count, hidden, ffn, heads, kv_heads;
    int64_t head_width;  // a multiple of 16
    int64_t kind;        // of the states, the gains, keys and values
    float eps, scale;
    int64_t threads, level;
};

// 0, or 1 if there is no memory to work in.
LLMQUANT_EXPORT int64_t llmquant_decode(const LlmquantStep* step);

namespace llmquant {

// What attention reads and writes of a token, besides its sequence: rows of whole heads.
struct TokenHeads {
    const float *q, *k, *v;
    float* out;
};

}  // namespace llmquant
