// Causal attention, for the instruction set that the build names in LLMQUANT_LEVEL.
//
// Scores are computed as K Q^T and outputs as V^T P^T, with a query in each lane. So no operand but Q is transposed,
// and the softmax, block by block as in FlashAttention (Dao et al., 2022), needs no sum across lanes.

#include "attention.h"

#include "exp.h"
#include "numbers.h"

namespace llmquant {
namespace {

constexpr int VECTORS = LANES == 16 ? 4 : 2;
constexpr int64_t QUERIES = VECTORS * LANES;  // queries, of all heads that share keys, that are worked on at once
constexpr int64_t KEYS = 128;                 // at once
constexpr int64_t ROWS = 4;                   // of a tile of the products
constexpr int64_t PIECE = 64;                 // numbers read or written at once
constexpr float LOWEST = -1e30f;              // below every score

constexpr int64_t whole(int64_t width) { return (width + ROWS - 1) / ROWS * ROWS; }

// What products are made of: numbers by themselves in fp32, or pairs of neighbours, in their depth, in bf16.
struct Floats {
    using Number = float;
    using Unit = float;
    using Units = Float;
    static constexpr int64_t DEPTH = 1;

    static void read(const void* from, int64_t kind, int64_t at, int64_t count, Number (&to)[PIECE]) {
        llmquant::read(from, kind, at, count, to);
    }
    static Float add_product(Float sum, Unit a, Units b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
struct Pairs {
    using Number = uint16_t;
    using Unit = int32_t;
    using Units = Int;
    static constexpr int64_t DEPTH = 2;

    static void read(const void* from, int64_t, int64_t at, int64_t count, Number (&to)[PIECE]) {
        for (Number& number : to) number = 0;
        copy(to, static_cast<const Number*>(from) + at, count);
    }
    static Float add_product(Float sum, Unit a, Units b) {
        return (Float)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(Int{} + a), (__m512bh)b);
    }
};
#endif

// c[ROWS][QUERIES] = a b, or + a b, where a[r][i] stands at a + r * row + i * step, and b is [depth][QUERIES]; all
// units.
template <typename Kind, bool ADD>
void multiply(const typename Kind::Unit* a, int64_t row, int64_t step, const typename Kind::Unit* b, int64_t depth,
              float* c) {
    Float sums[ROWS][VECTORS] = {};
    if (ADD)
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECTORS; ++v) sums[r][v] = load<Float>(c + r * QUERIES + v * LANES);
    for (int64_t i = 0; i < depth; ++i) {
        typename Kind::Units from[VECTORS];
        for (int v = 0; v < VECTORS; ++v) from[v] = load<typename Kind::Units>(b + i * QUERIES + v * LANES);
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECTORS; ++v)
                sums[r][v] = Kind::add_product(sums[r][v], a[r * row + i * step], from[v]);
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) store(c + r * QUERIES + v * LANES, sums[r][v]);
}

// What an item of work needs room for, in units of 4 bytes.
struct Room {
    int64_t width, v_width;  // of k and v in whole units and tiles
    int64_t q, scores, outputs, k, v;

    Room(const LlmquantAttention& task, int64_t depth) {
        width = ceil_div(task.qk_width, depth);
        v_width = whole(task.v_width);
        q = width * QUERIES;
        scores = KEYS * QUERIES;
        outputs = v_width * QUERIES;
        k = KEYS * width;
        v = KEYS / depth * v_width;
    }
};

// QUERIES queries of the heads that share one head of k and v: query r is head r % shared at position r / shared.
template <typename Kind>
class Panel {
    using Number = typename Kind::Number;
    using Unit = typename Kind::Unit;
    static constexpr int64_t DEPTH = Kind::DEPTH;

  public:
    Panel(const LlmquantAttention& task_, int64_t item, float* scratch)
        : task(task_), room(task_, DEPTH), factor(task_.scale * LOG2_E), shared(task_.heads / task_.kv_heads) {
        const int64_t panels = ceil_div(task.queries * shared, QUERIES);
        first = (panels - 1 - item % panels) * QUERIES;  // the longest first
        count = min(QUERIES, task.queries * shared - first);
        kv_head = item / panels % task.kv_heads;
        batch = item / panels / task.kv_heads;
        scores = scratch;
        outputs = scores + room.scores;
        q = reinterpret_cast<Unit*>(outputs + room.outputs);
        k = q + room.q;
        v = k + room.k;
    }

    void attend() {
        read_queries();
        for (int64_t i = 0; i < room.outputs; ++i) outputs[i] = 0.0f;
        for (int i = 0; i < VECTORS; ++i) most[i] = Float{} + LOWEST, total[i] = Float{};
        const int64_t end = position(count - 1) + 1;
        for (int64_t start = 0; start < end; start += KEYS) {
            const int64_t keys = min(KEYS, end - start);
            read_keys(start, keys);
            read_values(start, keys);
            for (int64_t key = 0; key < keys; key += ROWS)
                multiply<Kind, false>(k + key * room.width, room.width, 1, q, room.width, scores + key * QUERIES);
            for (int i = 0; i < VECTORS; ++i) to_weights(i, start, keys);
            for (int64_t i = 0; i < task.v_width; i += ROWS)
                multiply<Kind, true>(v + i, 1, room.v_width, reinterpret_cast<const Unit*>(scores),
                                     ceil_div(keys, DEPTH), outputs + i * QUERIES);
        }
        write_outputs();
    }

  private:
    // The last key that query r sees.
    int64_t position(int64_t r) const { return (first + r) / shared + task.keys - task.queries; }

    // q transposed.
    void read_queries() {
        auto* to = reinterpret_cast<Number*>(q);
        for (int64_t i = 0; i < room.q * DEPTH; ++i) to[i] = 0;
        for (int64_t r = 0; r < count; ++r) {
            const int64_t head = kv_head * shared + (first + r) % shared, t = (first + r) / shared;
            const int64_t at = batch * task.q_strides[0] + head * task.q_strides[1] + t * task.q_strides[2];
            for (int64_t i = 0; i < task.qk_width; i += PIECE) {
                Number numbers[PIECE];
                const int64_t some = min(PIECE, task.qk_width - i);
                Kind::read(task.q, task.kind, at + i, some, numbers);
                for (int64_t j = 0; j < some; ++j)
                    to[((i + j) / DEPTH * QUERIES + r) * DEPTH + (i + j) % DEPTH] = numbers[j];
            }
        }
    }

    // Keys [start, start + count), and zeros up to a whole tile: rows of `room.width` units.
    void read_keys(int64_t start, int64_t keys) {
        auto* to = reinterpret_cast<Number*>(k);
        const int64_t width = room.width * DEPTH;
        for (int64_t s = 0; s < whole(keys); ++s)
            for (int64_t i = 0; i < width; i += PIECE) {
                Number numbers[PIECE];
                read_row(task.k, task.k_strides, start + s, s < keys ? task.qk_width : 0, i, numbers);
                copy(to + s * width + i, numbers, min(PIECE, width - i));
            }
    }

    // Values of the same positions, `room.v_width` units for every DEPTH of them.
    void read_values(int64_t start, int64_t keys) {
        for (int64_t s = 0; s < keys; s += DEPTH)
            for (int64_t i = 0; i < room.v_width; i += PIECE) {
                Number numbers[DEPTH][PIECE];
                for (int64_t d = 0; d < DEPTH; ++d)
                    read_row(task.v, task.v_strides, start + s + d, s + d < keys ? task.v_width : 0, i, numbers[d]);
                Unit* to = v + s / DEPTH * room.v_width + i;
                const int64_t some = min(PIECE, room.v_width - i);
                if constexpr (DEPTH == 1)
                    for (int64_t j = 0; j < some; ++j) to[j] = numbers[0][j];
                else
                    for (int64_t j = 0; j < some; ++j)
                        to[j] = static_cast<Unit>(numbers[0][j] | static_cast<uint32_t>(numbers[1][j]) << 16);
            }
    }

    // Numbers [i, i + PIECE) of a row of `count` numbers; what is past them is zero.
    void read_row(const void* from, const int64_t* strides, int64_t position, int64_t count, int64_t i,
                  Number (&to)[PIECE]) const {
        const int64_t at = batch * strides[0] + kv_head * strides[1] + position * strides[2];
        const int64_t some = min(PIECE, count - i);
        Kind::read(from, task.kind, at + i, some > 0 ? some : 0, to);
    }

    // The scores of one vector of queries to exp(score - largest so far), in units; what was summed before is brought
    // to the same base.
    void to_weights(int vector, int64_t start, int64_t keys) {
        float* column = scores + vector * LANES;
        if (start + keys - 1 > position(vector * LANES)) hide(column, vector, start, keys);
        Float largest_yet = most[vector];
        for (int64_t key = 0; key < keys; ++key) {
            const Float score = load<Float>(column + key * QUERIES);
            largest_yet = score > largest_yet ? score : largest_yet;
        }
        const Float shrink = exp2_of((most[vector] - largest_yet) * factor);
        most[vector] = largest_yet;
        Float sum = total[vector] * shrink;
        for (int64_t key = 0; key < keys; key += DEPTH) {
            Float weights[DEPTH] = {};
            for (int64_t d = 0; d < min(DEPTH, keys - key); ++d)
                weights[d] = exp2_of((load<Float>(column + (key + d) * QUERIES) - largest_yet) * factor);
            if constexpr (DEPTH == 1) {
                sum += weights[0];
                store(column + key * QUERIES, weights[0]);
            } else {
                const Int even = to_bf16(weights[0]), odd = to_bf16(weights[1]);
                sum += (Float)(even << 16) + (Float)(odd << 16);
                store(column + key / DEPTH * QUERIES, even | odd << 16);
            }
        }
        total[vector] = sum;
        for (int64_t i = 0; i < task.v_width; ++i) {
            float* output = outputs + i * QUERIES + vector * LANES;
            store(output, load<Float>(output) * shrink);
        }
    }

    static Int to_bf16(Float value) { return to_half(value, LLMQUANT_BF16); }

    // Keys that come after a query get a score so far below all others that their weight is 0.
    void hide(float* column, int vector, int64_t start, int64_t keys) const {
        Int seen;
        for (int i = 0; i < LANES; ++i)
            seen[i] = static_cast<int32_t>(position(min(vector * LANES + i, count - 1)) - start);
        for (int64_t key = 0; key < keys; ++key) {
            const Float score = load<Float>(column + key * QUERIES);
            store(column + key * QUERIES, Int{} + static_cast<int32_t>(key) > seen ? Float{} + 2.0f * LOWEST : score);
        }
    }

    void write_outputs() const {
        for (int64_t r = 0; r < count; ++r) {
            const int64_t head = kv_head * shared + (first + r) % shared, t = (first + r) / shared;
            const int64_t at = ((batch * task.queries + t) * task.heads + head) * task.v_width;
            const float inverse = 1.0f / total[r / LANES][r % LANES];
            for (int64_t i = 0; i < task.v_width; i += PIECE) {
                float numbers[PIECE] = {};
                const int64_t some = min(PIECE, task.v_width - i);
                for (int64_t j = 0; j < some; ++j) numbers[j] = outputs[(i + j) * QUERIES + r] * inverse;
                write(numbers, task.out, task.kind, at + i, some);
            }
        }
    }

    const LlmquantAttention& task;
    const Room room;
    const float factor;    // from a score to a power of two
    const int64_t shared;  // heads of q that share one of k and v
    int64_t batch, kv_head, first, count;
    float *scores, *outputs;
    Unit *q, *k, *v;
    Float most[VECTORS], total[VECTORS];  // the largest score and the sum of weights of each query
};

void attend(const LlmquantAttention& task, int64_t item, float* scratch) {
#if defined(__AVX512BF16__)
    if (task.kind == LLMQUANT_BF16) return Panel<Pairs>(task, item, scratch).attend();
#endif
    Panel<Floats>(task, item, scratch).attend();
}

int64_t items(const LlmquantAttention& task) {
    return task.batch * task.kv_heads * ceil_div(task.queries * (task.heads / task.kv_heads), QUERIES);
}

int64_t scratch(const LlmquantAttention& task) {
    const Room room(task, 1);
    return room.q + room.scores + room.outputs + room.k + room.v;
}

}  // namespace

namespace LLMQUANT_LEVEL {
const AttentionKernels attention = {items, scratch, attend};
}

}  // namespace llmquant
