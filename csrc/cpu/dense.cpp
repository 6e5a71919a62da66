// Products of a few tokens with a dense weight, for the instruction set that the build names in LLMQUANT_LEVEL.

#include "dense.h"

#include "pieces.h"

namespace llmquant {
namespace {

constexpr int CHAINS = 4;  // sums that are begun side by side, so that none waits for its last product

int64_t whole_pieces(const LlmquantDense& task) { return ceil_div(task.columns, PIECE) * PIECE; }

// Tokens are multiplied as whole pieces in fp32.
int64_t room(const LlmquantDense& task) { return task.tokens * whole_pieces(task) * bytes_of(LLMQUANT_FP32); }

void prepare(const LlmquantDense& task, void* x) {
    for (int64_t t = 0; t < task.tokens; ++t)
        read_numbers(static_cast<const char*>(task.x) + t * task.columns * bytes_of(task.kind), task.kind, task.columns,
                     static_cast<float*>(x) + t * whole_pieces(task));
}

// Vectors whose lanes add up to the products of one row with TOKENS tokens, x [token][stride]. One row after the other:
// as one stream, a weight arrives from memory three times as fast as four rows at once do.
template <int64_t KIND, int TOKENS>
void dense_row(const LlmquantDense& task, const float* x, int64_t stride, int64_t row, Float (&y)[TOKENS]) {
    Piece sums[TOKENS][CHAINS] = {};
    const int64_t columns = task.columns, whole = columns / PIECE * PIECE;
    int64_t i = 0;
    for (; i + CHAINS * PIECE <= whole; i += CHAINS * PIECE)
        for (int c = 0; c < CHAINS; ++c) {
            const Piece w = read_whole<KIND>(task.w, row * columns + i + c * PIECE);
            for (int t = 0; t < TOKENS; ++t) add_product(sums[t][c], w, load_piece(x + t * stride + i + c * PIECE));
        }
    for (; i < columns; i += PIECE) {
        const Piece w = read_piece(task.w, KIND, row * columns + i, min(PIECE, columns - i));
        for (int t = 0; t < TOKENS; ++t) add_product(sums[t][0], w, load_piece(x + t * stride + i));
    }
    for (int t = 0; t < TOKENS; ++t) {
        y[t] = Float{};
        for (int c = 0; c < CHAINS; ++c)
            for (int v = 0; v < V; ++v) y[t] += sums[t][c].of[v];
    }
}

// Rows [first, first + count) of at most a piece, for TOKENS tokens.
template <int64_t KIND, int TOKENS>
void dense_rows(const LlmquantDense& task, const float* x, int64_t token, int64_t first, int64_t count) {
    float y[TOKENS][PIECE] = {};
    const int64_t stride = whole_pieces(task);
    for (int64_t part = 0; part < count; part += LANES) {
        Float rows[TOKENS][LANES] = {};
        for (int64_t r = 0; r < min(LANES, count - part); ++r) {
            Float row[TOKENS];
            dense_row<KIND, TOKENS>(task, x + token * stride, stride, first + part + r, row);
            for (int t = 0; t < TOKENS; ++t) rows[t][r] = row[t];
        }
        for (int t = 0; t < TOKENS; ++t) store(y[t] + part, sums(rows[t]));
    }
    for (int t = 0; t < TOKENS; ++t) write(y[t], task.y, KIND, (token + t) * task.rows + first, count);
}

// All tokens pass some rows while these are in the caches.
void multiply(const LlmquantDense& task, const void* given, int64_t first, int64_t last) {
    const auto* x = static_cast<const float*>(given);
    with_kind(task.kind, [&](auto kind) {
        for (int64_t row = first; row < last; row += PIECE) {
            const int64_t count = min(PIECE, last - row);
            int64_t token = 0;
            for (; token + 4 <= task.tokens; token += 4) dense_rows<kind.value, 4>(task, x, token, row, count);
            for (; token + 2 <= task.tokens; token += 2) dense_rows<kind.value, 2>(task, x, token, row, count);
            if (token < task.tokens) dense_rows<kind.value, 1>(task, x, token, row, count);
        }
    });
}

}  // namespace

namespace LLMQUANT_LEVEL {
const DenseKernels dense = {room, prepare, multiply};
}

}  // namespace llmquant
