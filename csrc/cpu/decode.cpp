// What tokens need besides products with packed weights, for the instruction set that the build names in
// LLMQUANT_LEVEL.

#include "decode.h"

#include "exp.h"
#include "pieces.h"

namespace llmquant {
namespace {

constexpr int64_t LINE = 64;  // bytes that memory sends at once

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

void score(const void* weight, int64_t kind, int64_t count, const float* x, int64_t first, int64_t last,
           float* scores) {
    with_kind(kind, [&](auto known) {
        const int64_t whole = count / PIECE * PIECE;
        for (int64_t row = first; row < last; ++row) {
            Piece sums = {};
            for (int64_t i = 0; i < whole; i += PIECE)
                add_product(sums, load_piece(x + i), read_whole<known.value>(weight, row * count + i));
            if (whole < count)
                add_product(sums, load_piece(x + whole), read_piece(weight, kind, row * count + whole, count - whole));
            scores[row] = total(sums);
        }
    });
}

}  // namespace

namespace LLMQUANT_LEVEL {
const DecodeKernels decode = {read_numbers, write_numbers, norm, attend, gated, score};
}

}  // namespace llmquant
