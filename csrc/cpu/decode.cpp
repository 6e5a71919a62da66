// What tokens need besides products with packed weights, for the instruction set that the build names in
// LLMQUANT_LEVEL.

#include "decode.h"

#include "exp.h"
#include "numbers.h"

namespace llmquant {
namespace {

constexpr int64_t PIECE = 16;  // numbers read at once
constexpr int V = PIECE / LANES;

struct Piece {
    Float of[V];
};

template <int64_t KIND>
struct Kind {
    static constexpr int64_t value = KIND;
};

Piece read_piece(const void* from, int64_t kind, int64_t at, int64_t count) {
    float numbers[PIECE];
    read(from, kind, at, count, numbers);
    Piece piece;
    for (int v = 0; v < V; ++v) piece.of[v] = load<Float>(numbers + v * LANES);
    return piece;
}

// A whole piece, without a detour through memory.
template <int64_t KIND>
inline Piece read_whole(const void* from, int64_t at) {
    Piece piece;
    for (int v = 0; v < V; ++v)
        piece.of[v] = KIND == LLMQUANT_FP32 ? load<Float>(static_cast<const float*>(from) + at + v * LANES)
                                            : from_half(static_cast<const uint16_t*>(from) + at + v * LANES, KIND);
    return piece;
}

// `work` with the kind as a constant, so that inner loops need not ask for it.
template <typename Work>
void with_kind(int64_t kind, Work work) {
    if (kind == LLMQUANT_BF16)
        work(Kind<LLMQUANT_BF16>{});
    else if (kind == LLMQUANT_FP16)
        work(Kind<LLMQUANT_FP16>{});
    else
        work(Kind<LLMQUANT_FP32>{});
}

inline Piece load_piece(const float* from) {
    Piece piece;
    for (int v = 0; v < V; ++v) piece.of[v] = load<Float>(from + v * LANES);
    return piece;
}

inline void add_product(Piece& sum, const Piece& a, const Piece& b) {
    for (int v = 0; v < V; ++v) sum.of[v] += a.of[v] * b.of[v];
}

inline float total(const Piece& piece) {
    Float all = piece.of[0];
    for (int v = 1; v < V; ++v) all += piece.of[v];
    return sum(all);
}

void read_numbers(const void* from, int64_t kind, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += PIECE) {
        const Piece piece = read_piece(from, kind, i, min(PIECE, count - i));
        for (int v = 0; v < V; ++v) store(to + i + v * LANES, piece.of[v]);
    }
}

void write_numbers(const float* from, int64_t kind, int64_t count, void* to) {
    for (int64_t i = 0; i < count; i += PIECE) {
        float numbers[PIECE];
        __builtin_memcpy(numbers, from + i, sizeof numbers);
        write(numbers, to, kind, i, min(PIECE, count - i));
    }
}

float root(float x) { return __builtin_sqrtf(x); }

void norm(const LlmquantStep& step, const float* state, const void* gain, float* to) {
    Piece squares = {};
    for (int64_t i = 0; i < step.hidden; i += PIECE) {
        const Piece piece = load_piece(state + i);
        add_product(squares, piece, piece);
    }
    const float inverse = 1.0f / root(total(squares) / static_cast<float>(step.hidden) + step.eps);
    for (int64_t i = 0; i < step.hidden; i += PIECE) {
        const Piece piece = load_piece(state + i), factor = read_piece(gain, step.kind, i, min(PIECE, step.hidden - i));
        for (int v = 0; v < V; ++v) store(to + i + v * LANES, piece.of[v] * inverse * factor.of[v]);
    }
}

// Rotated by the position: halves of the head are the two coordinates.
void rotate(const LlmquantSequence& sequence, const float* from, int64_t width, float* to) {
    const int64_t half = width / 2;
    const float *cosines = sequence.cosines, *sines = sequence.sines;
    for (int64_t i = 0; i < half; ++i) {
        to[i] = from[i] * cosines[i] - from[i + half] * sines[i];
        to[i + half] = from[i + half] * cosines[i + half] + from[i] * sines[i + half];
    }
}

template <int64_t KIND>
float dot(const float* q, const void* from, int64_t at, int64_t width) {
    Piece products = {};
    for (int64_t i = 0; i < width; i += PIECE) add_product(products, load_piece(q + i), read_whole<KIND>(from, at + i));
    return total(products);
}

template <int64_t KIND>
void attend_to(const LlmquantStep& step, const LlmquantSequence& sequence, int64_t layer, const TokenHeads& heads,
               int64_t first, int64_t last, float* scratch) {
    const int64_t width = step.head_width, shared = step.heads / step.kv_heads;
    const int64_t before = sequence.before, count = before + 1;
    void *keys = sequence.keys[layer], *values = sequence.values[layer];
    float *q = scratch, *key = q + width, *out = key + width, *scores = out + width;
    for (int64_t head = first; head < last; ++head) {
        const int64_t group = head / shared, start = group * sequence.capacity * width, now = start + before * width;
        const float* value = heads.v + group * width;
        rotate(sequence, heads.q + head * width, width, q);
        rotate(sequence, heads.k + group * width, width, key);
        if (head % shared == 0)
            for (int64_t i = 0; i < width; i += PIECE) {
                float numbers[2][PIECE];
                __builtin_memcpy(numbers[0], key + i, sizeof numbers[0]);
                __builtin_memcpy(numbers[1], value + i, sizeof numbers[1]);
                write(numbers[0], keys, KIND, now + i, PIECE);
                write(numbers[1], values, KIND, now + i, PIECE);
            }
        // This token's key and value are taken from where they were computed: another thread may be writing them.
        for (int64_t s = 0; s < before; ++s) scores[s] = dot<KIND>(q, keys, start + s * width, width);
        scores[before] = dot<LLMQUANT_FP32>(q, key, 0, width);
        float most = scores[0];
        for (int64_t s = 1; s < count; ++s) most = scores[s] > most ? scores[s] : most;
        const int64_t whole = ceil_div(count, PIECE) * PIECE;
        for (int64_t s = count; s < whole; ++s) scores[s] = most - 1e30f;
        Float sums = {};
        for (int64_t s = 0; s < whole; s += LANES) {
            const Float weight = exp2_of((load<Float>(scores + s) - most) * (step.scale * LOG2_E));
            sums += weight;
            store(scores + s, weight);
        }
        const float inverse = 1.0f / sum(sums);
        for (int64_t i = 0; i < width; i += PIECE) {
            Piece piece = load_piece(value + i);
            for (int v = 0; v < V; ++v) piece.of[v] *= scores[before];
            for (int64_t s = 0; s < before; ++s) {
                const Piece row = read_whole<KIND>(values, start + s * width + i);
                for (int v = 0; v < V; ++v) piece.of[v] += row.of[v] * scores[s];
            }
            for (int v = 0; v < V; ++v) store(out + i + v * LANES, piece.of[v] * inverse);
        }
        copy(heads.out + head * width, out, width);
    }
}

void attend(const LlmquantStep& step, const LlmquantSequence& sequence, int64_t layer, const TokenHeads& heads,
            int64_t first, int64_t last, float* scratch) {
    with_kind(step.kind, [&](auto kind) { attend_to<kind.value>(step, sequence, layer, heads, first, last, scratch); });
}

// gate[i] = silu(gate[i]) * up[i]
void gated(float* gate, const float* up, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(gate + i, silu(load<Float>(gate + i)) * load<Float>(up + i));
    if (i == count) return;
    float rest[2][LANES] = {};
    copy(rest[0], gate + i, count - i);
    copy(rest[1], up + i, count - i);
    store(rest[0], silu(load<Float>(rest[0])) * load<Float>(rest[1]));
    copy(gate + i, rest[0], count - i);
}

// ---- dense products

constexpr int CHAINS = 4;  // sums that are begun side by side, so that none waits for its last product

// One row after the other: as one stream, a weight arrives from memory three times as fast as four rows at once do.
template <int64_t KIND, int TOKENS>
void dense_row(const LlmquantDense& task, int64_t token, int64_t row, float* y) {
    Piece sums[TOKENS][CHAINS] = {};
    const int64_t columns = task.columns, whole = columns / PIECE * PIECE;
    int64_t i = 0;
    for (; i + CHAINS * PIECE <= whole; i += CHAINS * PIECE)
        for (int c = 0; c < CHAINS; ++c) {
            const Piece w = read_whole<KIND>(task.w, row * columns + i + c * PIECE);
            for (int t = 0; t < TOKENS; ++t)
                add_product(sums[t][c], w, read_whole<KIND>(task.x, (token + t) * columns + i + c * PIECE));
        }
    for (; i < columns; i += PIECE) {
        const int64_t count = min(PIECE, columns - i);
        const Piece w = read_piece(task.w, KIND, row * columns + i, count);
        for (int t = 0; t < TOKENS; ++t)
            add_product(sums[t][0], w, read_piece(task.x, KIND, (token + t) * columns + i, count));
    }
    for (int t = 0; t < TOKENS; ++t) {
        for (int c = 1; c < CHAINS; ++c)
            for (int v = 0; v < V; ++v) sums[t][0].of[v] += sums[t][c].of[v];
        y[t * PIECE] = total(sums[t][0]);
    }
}

// Rows [first, first + count) of at most a piece, for TOKENS tokens.
template <int64_t KIND, int TOKENS>
void dense_rows(const LlmquantDense& task, int64_t token, int64_t first, int64_t count) {
    float y[TOKENS][PIECE] = {};
    for (int64_t r = 0; r < count; ++r) dense_row<KIND, TOKENS>(task, token, first + r, &y[0][r]);
    for (int t = 0; t < TOKENS; ++t) write(y[t], task.y, KIND, (token + t) * task.rows + first, count);
}

// All tokens pass some rows while these are in the caches.
void dense(const LlmquantDense& task, int64_t first, int64_t last) {
    with_kind(task.kind, [&](auto kind) {
        for (int64_t row = first; row < last; row += PIECE) {
            const int64_t count = min(PIECE, last - row);
            int64_t token = 0;
            for (; token + 4 <= task.tokens; token += 4) dense_rows<kind.value, 4>(task, token, row, count);
            for (; token + 2 <= task.tokens; token += 2) dense_rows<kind.value, 2>(task, token, row, count);
            if (token < task.tokens) dense_rows<kind.value, 1>(task, token, row, count);
        }
    });
}

}  // namespace

namespace LLMQUANT_LEVEL {
const DecodeKernels decode = {read_numbers, write_numbers, norm, attend, gated, dense};
}

}  // namespace llmquant
