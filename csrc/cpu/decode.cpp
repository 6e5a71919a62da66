// What tokens need besides products with packed weights, for the instruction set that the build names in
// LLMQUANT_LEVEL.

#include "decode.h"

#include "exp.h"
#include "numbers.h"

namespace llmquant {
namespace {

constexpr int64_t PIECE = 16;  // numbers read at once
constexpr int64_t LINE = 64;   // bytes that memory sends at once
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

void norm(const LlmquantStep& step, const float* from, int64_t count, const void* gain, float* to) {
    Piece squares = {};
    for (int64_t i = 0; i < count; i += PIECE) {
        const Piece piece = load_piece(from + i);
        add_product(squares, piece, piece);
    }
    const float inverse = 1.0f / root(total(squares) / static_cast<float>(count) + step.eps);
    for (int64_t i = 0; i < count; i += PIECE) {
        const Piece piece = load_piece(from + i), factor = read_piece(gain, step.kind, i, min(PIECE, count - i));
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
inline Float read_vector(const void* from, int64_t at) {
    return KIND == LLMQUANT_FP32 ? load<Float>(static_cast<const float*>(from) + at)
                                 : from_half(static_cast<const uint16_t*>(from) + at, KIND);
}

// Query heads that share a key, which is read once for all of them.
template <int64_t KIND, int HEADS>
class Group {
  public:
    Group(const LlmquantStep& step_, const LlmquantSequence& sequence_, int64_t layer_, int64_t group, float* scratch)
        : step(step_),
          layer(step.layers[layer_]),
          sequence(sequence_),
          width(step.head_width),
          count(sequence.before + 1),
          room(ceil_div(count, PIECE) * PIECE),
          start(group * sequence.capacity * width),
          scale(step.scale * LOG2_E),
          keys(sequence.keys[layer_]),
          values(sequence.values[layer_]),
          q(scratch),
          key(q + HEADS * width),
          normed(key + width),
          scores(normed + width) {}

    // The first head's query, the key and the value of this token; `out` is like q. `writes`: what is theirs is put
    // behind the others'.
    void attend(const float* query, const float* own_key, const float* own_value, bool writes, float* out) {
        for (int h = 0; h < HEADS; ++h) bring(query + h * width, layer.q_gain, q + h * width);
        bring(own_key, layer.k_gain, key);
        if (writes) remember(own_value);
        compare();
        for (int h = 0; h < HEADS; ++h) inverse[h] = weigh(scores + h * room);
        constexpr int AT_ONCE = LANES == 16 ? 4 : 2;  // vectors: as many sums as fit the registers
        int64_t i = 0;
        for (; i + AT_ONCE * LANES <= width; i += AT_ONCE * LANES) mix<AT_ONCE>(own_value, i, out);
        for (; i < width; i += LANES) mix<1>(own_value, i, out);
    }

  private:
    // A head of q or k to what is compared.
    void bring(const float* from, const void* gain, float* to) {
        if (gain) norm(step, from, width, gain, normed);
        rotate(sequence, gain ? normed : from, width, to);
    }

    // A row is asked for before it is read: a head's are too few to be noticed as a stream.
    void fetch(const void* from, int64_t at) const {
        for (int64_t i = 0; i < width * bytes_of(KIND); i += LINE)
            __builtin_prefetch(static_cast<const char*>(from) + at * bytes_of(KIND) + i);
    }

    void remember(const float* value) const {
        const int64_t now = start + sequence.before * width;
        for (int64_t i = 0; i < width; i += PIECE) {
            float numbers[2][PIECE];
            __builtin_memcpy(numbers[0], key + i, sizeof numbers[0]);
            __builtin_memcpy(numbers[1], value + i, sizeof numbers[1]);
            write(numbers[0], keys, KIND, now + i, PIECE);
            write(numbers[1], values, KIND, now + i, PIECE);
        }
    }

    // Scores: of some keys at once, so that their sums across lanes are made together. This token's key and value are
    // taken from where they were computed: another thread may be writing them.
    void compare() {
        for (int64_t s = 0; s < sequence.before; s += LANES) {
            Float products[HEADS][LANES];
            const int64_t some = min(LANES, sequence.before - s);
            for (int64_t r = 0; r < LANES; ++r) {
                const int64_t row = start + (s + min(r, some - 1)) * width;  // what is too much is overwritten below
                fetch(values, row);
                for (int h = 0; h < HEADS; ++h) products[h][r] = Float{};
                for (int64_t i = 0; i < width; i += LANES) {
                    const Float k = read_vector<KIND>(keys, row + i);
                    for (int h = 0; h < HEADS; ++h) products[h][r] += load<Float>(q + h * width + i) * k;
                }
            }
            for (int h = 0; h < HEADS; ++h) store(scores + h * room + s, sums(products[h]));
        }
        for (int h = 0; h < HEADS; ++h) {
            Piece products = {};
            for (int64_t i = 0; i < width; i += PIECE)
                add_product(products, load_piece(q + h * width + i), load_piece(key + i));
            scores[h * room + sequence.before] = total(products);
        }
    }

    // exp(scale (score - the largest)) in the place of each score; one over their sum.
    float weigh(float* weights) const {
        for (int64_t s = count; s < room; ++s) weights[s] = weights[0];
        Float larger = load<Float>(weights);
        for (int64_t s = LANES; s < room; s += LANES) {
            const Float some = load<Float>(weights + s);
            larger = some > larger ? some : larger;
        }
        const float most = largest(larger);
        for (int64_t s = count; s < room; ++s) weights[s] = most - 1e30f;
        Float sums = {};
        for (int64_t s = 0; s < room; s += LANES) {
            const Float weight = exp2_of((load<Float>(weights + s) - most) * scale);
            sums += weight;
            store(weights + s, weight);
        }
        return 1.0f / sum(sums);
    }

    // Columns [i, i + VECTORS * LANES) of the weighted sums of all values.
    template <int VECTORS>
    void mix(const float* own, int64_t i, float* out) const {
        Float mixed[HEADS][VECTORS];
        for (int h = 0; h < HEADS; ++h)
            for (int v = 0; v < VECTORS; ++v)
                mixed[h][v] = load<Float>(own + i + v * LANES) * scores[h * room + sequence.before];
        for (int64_t s = 0; s < sequence.before; ++s)
            for (int v = 0; v < VECTORS; ++v) {
                const Float row = read_vector<KIND>(values, start + s * width + i + v * LANES);
                for (int h = 0; h < HEADS; ++h) mixed[h][v] += row * scores[h * room + s];
            }
        for (int h = 0; h < HEADS; ++h)
            for (int v = 0; v < VECTORS; ++v) store(out + h * width + i + v * LANES, mixed[h][v] * inverse[h]);
    }

    const LlmquantStep& step;
    const LlmquantLayer& layer;
    const LlmquantSequence& sequence;
    const int64_t width, count, room, start;
    const float scale;
    void *const keys, *const values;
    float *const q, *const key, *const normed, *const scores;
    float inverse[HEADS];
};

template <int64_t KIND, int HEADS>
void attend_group(const LlmquantStep& step, const LlmquantSequence& sequence, int64_t layer, const TokenHeads& heads,
                  int64_t head, float* scratch) {
    const int64_t width = step.head_width, shared = step.heads / step.kv_heads, group = head / shared;
    Group<KIND, HEADS>(step, sequence, layer, group, scratch)
        .attend(heads.q + head * width, heads.k + group * width, heads.v + group * width, head % shared == 0,
                heads.out + head * width);
}

template <int64_t KIND>
void attend_to(const LlmquantStep& step, const LlmquantSequence& sequence, int64_t layer, const TokenHeads& heads,
               int64_t first, int64_t last, float* scratch) {
    static_assert(LLMQUANT_HEADS_TOGETHER == 4, "has a case for each number below");
    const int64_t shared = step.heads / step.kv_heads;
    for (int64_t head = first, count; head < last; head += count) {
        count = min(LLMQUANT_HEADS_TOGETHER, min(last, (head / shared + 1) * shared) - head);
        if (count == 1) attend_group<KIND, 1>(step, sequence, layer, heads, head, scratch);
        if (count == 2) attend_group<KIND, 2>(step, sequence, layer, heads, head, scratch);
        if (count == 3) attend_group<KIND, 3>(step, sequence, layer, heads, head, scratch);
        if (count == 4) attend_group<KIND, 4>(step, sequence, layer, heads, head, scratch);
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
    const int64_t stride = ceil_div(task.columns, PIECE) * PIECE;
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

// All tokens, of whole pieces in fp32, pass some rows while these are in the caches.
void dense(const LlmquantDense& task, const float* x, int64_t first, int64_t last) {
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
const DecodeKernels decode = {read_numbers, write_numbers, norm, attend, gated, dense};
}

}  // namespace llmquant
