// What the library offers and how its parts meet. The interface is plain C, so that one binary serves every version of
// Python and torch.
#pragma once

#include <cstdint>

#define LLMQUANT_EXPORT extern "C" __attribute__((visibility("default")))

struct LlmquantAttention;
struct LlmquantLinear;
struct LlmquantStep;
struct LlmquantColumns;
struct LlmquantDense;
struct LlmquantSequence;

LLMQUANT_EXPORT int64_t llmquant_abi();
// The instruction sets that this machine can run, best first; null past the last.
LLMQUANT_EXPORT const char* llmquant_level(int64_t level);
// 1 if OpenMP was there to build with, else everything runs on one thread.
LLMQUANT_EXPORT int64_t llmquant_threaded();
// Ends the threads with which the caller's thread has computed; it gets others when it computes again. If there are
// more threads than processors, OpenMP puts those that wait to sleep at once, and waking them takes longer than much of
// what they do: so who hands its work to a thread of its own lets go of these before.
LLMQUANT_EXPORT void llmquant_release_threads();

namespace llmquant {

struct Integers;
struct TokenHeads;

// Bytes of a panel that are asked for before a single token reads them, on this processor; 0: none.
extern const int64_t ahead_of_reading;

// rows.cpp, once for each instruction set, and tiles.cpp.
struct LinearKernels {
    void (*to_integers)(const LlmquantLinear& task, const Integers& x, int64_t first, int64_t last);  // tokens
    void (*multiply)(const LlmquantLinear& task, const Integers& x, int64_t first, int64_t last);     // panels
};

// attention.cpp, likewise: what can be done at the same time, and the numbers that each needs to work in.
struct AttentionKernels {
    int64_t (*items)(const LlmquantAttention& task);
    int64_t (*scratch)(const LlmquantAttention& task);
    void (*attend)(const LlmquantAttention& task, int64_t item, float* scratch);
};

// decode.cpp, likewise. Vectors of fp32 have room for whole multiples of 16, and zeros there.
struct DecodeKernels {
    void (*read)(const void* from, int64_t kind, int64_t count, float* to);
    void (*write)(const float* from, int64_t kind, int64_t count, void* to);
    void (*norm)(const LlmquantStep& step, const float* from, int64_t count, const void* gain, float* to);
    // Attention of a token's query heads [first, last) to the keys before and their own, which the first of those that
    // share it writes behind the others. `scratch` has room for the scores of LLMQUANT_HEADS_TOGETHER heads, these
    // heads, and two more.
    void (*attend)(const LlmquantStep& step, const LlmquantSequence& sequence, int64_t layer, const TokenHeads& heads,
                   int64_t first, int64_t last, float* scratch);
    void (*gated)(float* gate, const float* up, int64_t count);  // gate = silu(gate) * up
    // Rows [first, last) of a weight [][count] times x.
    void (*score)(const void* weight, int64_t kind, int64_t count, const float* x, int64_t first, int64_t last,
                  float* scores);
};

// dense.cpp, likewise, and dense_tiles.cpp.
struct DenseKernels {
    int64_t (*room)(const LlmquantDense& task);           // bytes of the tokens as they are multiplied
    void (*prepare)(const LlmquantDense& task, void* x);  // these
    void (*multiply)(const LlmquantDense& task, const void* x, int64_t first, int64_t last);  // rows
};

// columns.cpp, likewise.
struct SolveKernels {
    int64_t tile;  // rows that are best taken together
    void (*round_columns)(const LlmquantColumns& task, int64_t first, int64_t last);
    void (*search_grids)(const LlmquantColumns& task, int64_t first, int64_t last);
};

namespace amx {
extern const DenseKernels dense;
extern const LinearKernels linear;
}  // namespace amx
namespace avx512bf16 {
extern const AttentionKernels attention;
}  // namespace avx512bf16
namespace avx512vnni {
extern const LinearKernels linear;
}  // namespace avx512vnni
namespace avx512 {
extern const AttentionKernels attention;
extern const DecodeKernels decode;
extern const DenseKernels dense;
extern const LinearKernels linear;
extern const SolveKernels solve;
}  // namespace avx512
namespace avx2 {
extern const AttentionKernels attention;
extern const DecodeKernels decode;
extern const DenseKernels dense;
extern const LinearKernels linear;
extern const SolveKernels solve;
}  // namespace avx2
namespace baseline {
extern const AttentionKernels attention;
extern const DecodeKernels decode;
extern const DenseKernels dense;
extern const LinearKernels linear;
extern const SolveKernels solve;
}  // namespace baseline

}  // namespace llmquant
