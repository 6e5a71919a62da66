// Numbers of any kind, 16 at a time, on every instruction set.
#pragma once

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

inline Piece read_piece(const void* from, int64_t kind, int64_t at, int64_t count) {
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
inline void with_kind(int64_t kind, Work work) {
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

inline void read_numbers(const void* from, int64_t kind, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += PIECE) {
        const Piece piece = read_piece(from, kind, i, min(PIECE, count - i));
        for (int v = 0; v < V; ++v) store(to + i + v * LANES, piece.of[v]);
    }
}

}  // namespace
}  // namespace llmquant
