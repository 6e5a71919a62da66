// Products with packed weights, for the instruction set that the build names in LLMQUANT_LEVEL.

#include "dot.h"
#include "integers.h"
#include "panel.h"

namespace llmquant {
namespace {

// Rows of x (tokens times planes, twice that with 8 bits) that are multiplied at once: what fits the registers.
constexpr int MOST = LANES == 16 ? 12 : LANES == 8 ? 4 : 2;
constexpr int panels_at_once(int rows) {
    if (LANES == 16) return rows <= 4 ? 4 : rows <= 12 ? 2 : 1;
    return LANES == 8 && rows == 1 ? 2 : 1;
}

constexpr int64_t CACHED = 1 << 18;  // bytes of x that stay in the second-level cache while the panels pass

template <int PLANES>
void to_integers(const LlmquantLinear& task, const Integers& x, int64_t first, int64_t last) {
    const int64_t stride = padded(task.columns), block = block_of(task), blocks = blocks_of(task);
    for (int64_t t = first; t < last; ++t)
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t start = b * block, count = min(block, task.columns - start);
            float values[LLMQUANT_BLOCK_MOST];
            read(task.x, task.x_kind, t * task.columns + start, count, values);
            int8_t* to = x.planes + t * PLANES * stride + start;
            block_to_integers<PLANES>(
                values, min(block, stride - start), [&](int plane, int64_t i) { return to + plane * stride + i; },
                x.scales + t * blocks + b, x.sums + t * blocks + b);
        }
}

void to_integers_any(const LlmquantLinear& task, const Integers& x, int64_t first, int64_t last) {
    task.planes == 1 ? to_integers<1>(task, x, first, last) : to_integers<2>(task, x, first, last);
}

// ---- products

// PANELS panels times TOKENS tokens. Sums of integers are exact and those of blocks are added in order, so a token's
// result depends neither on its company nor on the instruction set, but for the rounding of fused products.
template <int BITS, int PLANES, int PANELS, int TOKENS>
class Tile {
  public:
    Tile(const LlmquantLinear& task_, const Integers& x_, int64_t panel_, int64_t token_)
        : task(task_), x(x_), panel(panel_), token(token_), stride(padded(task_.columns)) {}

    void multiply() {
        const int64_t block = block_of(task), blocks = blocks_of(task);
        Float totals[TOKENS][PANELS][V];  // an initializer would be `rep stos`, which is slow to begin
        for (int t = 0; t < TOKENS; ++t)
            for (int p = 0; p < PANELS; ++p)
                for (int v = 0; v < V; ++v) totals[t][p][v] = Float{};
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t first = b * block, last = min(first + block, stride), group = first / task.group;
            Sums sums[PLANES][TOKENS];
            for (int p = 0; p < PANELS; ++p)
                for (int v = 0; v < V; ++v) {
                    const Int zero = Grid::zero(task, panel + p, group, v);
                    for (int t = 0; t < TOKENS; ++t) {
                        sums[0][t].of[p][v] = Int{};
                        sums[PLANES - 1][t].of[p][v] = -zero * x.sums[(token + t) * blocks + b];
                    }
                }
            for (int64_t from = first; from < last; from += WIDE ? block : CHUNK)
                accumulate(from, WIDE ? last : from + CHUNK, sums);
            for (int p = 0; p < PANELS; ++p)
                for (int v = 0; v < V; ++v) {
                    const Float scale = Grid::scale(task, panel + p, group, v);
                    for (int t = 0; t < TOKENS; ++t) {
                        Int integer = sums[PLANES - 1][t].of[p][v];
                        if (PLANES == 2) integer += sums[0][t].of[p][v] << 7;
                        const float x_scale = x.scales[(token + t) * blocks + b];
                        totals[t][p][v] += __builtin_convertvector(integer, Float) * (scale * x_scale);
                    }
                }
        }
        for (int t = 0; t < TOKENS; ++t)
            for (int p = 0; p < PANELS; ++p) write_panel(task, totals[t][p], token + t, panel + p);
    }

  private:
    static constexpr int SPLIT = BITS / 4;  // 8-bit codes are multiplied nibble by nibble

    struct Sums {
        Int of[PANELS][V];
    };

    // The products of columns [from, to): one chunk, or any number where partial sums are wide.
    void accumulate(int64_t from, int64_t to, Sums (&sums)[PLANES][TOKENS]) const {
        Partial parts[SPLIT][PLANES][TOKENS][PANELS][V] = {};
        for (int plane = 0; plane < PLANES; ++plane)
            for (int t = 0; t < TOKENS; ++t)
                for (int p = 0; p < PANELS; ++p)
                    for (int v = 0; v < V; ++v) parts[0][plane][t][p][v] = begin(sums[plane][t].of[p][v]);
        const int8_t* at = x.planes + token * PLANES * stride;
        const int64_t size = offset<BITS>(stride), ahead = min(ahead_of_reading, size);
        const uint8_t* codes = task.codes + panel * size;
        for (int64_t column = from; column < to; column += 32 / BITS) {
            // What is read next is asked for, at a panel's end the start of one of the next tile; or else what is being
            // read, which costs nothing.
            const int64_t next = offset<BITS>(column) + ahead < size ? ahead : ahead + (PANELS - 1) * size;
            Int low[PANELS][V], high[PANELS][V];
            for (int p = 0; p < PANELS; ++p)
                for (int v = 0; v < V; ++v) {
                    const uint8_t* from = codes + p * size + offset<BITS>(column) + v * 4 * LANES;
                    const Int bytes = load<Int>(from);
                    if (TOKENS == 1) __builtin_prefetch(from + next);
                    low[p][v] = low_nibbles(bytes);
                    high[p][v] = high_nibbles(bytes);
                }
            for (int t = 0; t < TOKENS; ++t)
                for (int plane = 0; plane < PLANES; ++plane) {
                    const int8_t* row = at + (t * PLANES + plane) * stride + column;
                    const Operand first = operand(row), second = BITS == 4 ? operand(row + 4) : first;
                    for (int p = 0; p < PANELS; ++p)
                        for (int v = 0; v < V; ++v) {
                            Partial& lower = parts[0][plane][t][p][v];
                            Partial& upper = parts[SPLIT - 1][plane][t][p][v];
                            lower = add_products(lower, low[p][v], first);
                            upper = add_products(upper, high[p][v], second);
                        }
                }
        }
        for (int plane = 0; plane < PLANES; ++plane)
            for (int t = 0; t < TOKENS; ++t)
                for (int p = 0; p < PANELS; ++p)
                    for (int v = 0; v < V; ++v) {
                        Int& sum = sums[plane][t].of[p][v];
                        sum = end(sum, parts[0][plane][t][p][v]);
                        if (SPLIT == 2) sum += end(Int{}, parts[SPLIT - 1][plane][t][p][v]) << 4;
                    }
    }

    const LlmquantLinear& task;
    const Integers& x;
    const int64_t panel, token, stride;
};

// Tokens [token, end) with panels [first, last): as many as make whole tiles. Returns the first token that is left.
template <int BITS, int PLANES, int TOKENS>
int64_t multiply_tiles(const LlmquantLinear& task, const Integers& x, int64_t first, int64_t last, int64_t token,
                       int64_t end) {
    constexpr int ROWS = TOKENS * PLANES * BITS / 4;
    if constexpr (TOKENS == 1 || ROWS <= MOST) {
        constexpr int PANELS = panels_at_once(ROWS);
        for (; token + TOKENS <= end; token += TOKENS) {
            int64_t panel = first;
            for (; panel + PANELS <= last; panel += PANELS)
                Tile<BITS, PLANES, PANELS, TOKENS>(task, x, panel, token).multiply();
            for (; panel < last; ++panel) Tile<BITS, PLANES, 1, TOKENS>(task, x, panel, token).multiply();
        }
    }
    return token;
}

template <int BITS, int PLANES>
void multiply(const LlmquantLinear& task, const Integers& x, int64_t first, int64_t last) {
    constexpr int64_t TOGETHER = 4;  // panels that stay in cache while some tokens pass
    const int64_t some = CACHED / (padded(task.columns) * PLANES) / 12 * 12 + 12;
    for (int64_t token = 0; token < task.tokens; token += some)
        for (int64_t panel = first; panel < last; panel += TOGETHER) {
            const int64_t end = min(task.tokens, token + some), until = min(last, panel + TOGETHER);
            int64_t t = multiply_tiles<BITS, PLANES, 12>(task, x, panel, until, token, end);
            t = multiply_tiles<BITS, PLANES, 4>(task, x, panel, until, t, end);
            t = multiply_tiles<BITS, PLANES, 2>(task, x, panel, until, t, end);
            multiply_tiles<BITS, PLANES, 1>(task, x, panel, until, t, end);
        }
}

void multiply_any(const LlmquantLinear& task, const Integers& x, int64_t first, int64_t last) {
    if (task.bits == 4)
        task.planes == 1 ? multiply<4, 1>(task, x, first, last) : multiply<4, 2>(task, x, first, last);
    else
        task.planes == 1 ? multiply<8, 1>(task, x, first, last) : multiply<8, 2>(task, x, first, last);
}

}  // namespace

namespace LLMQUANT_LEVEL {
const LinearKernels linear = {to_integers_any, multiply_any};
}

}  // namespace llmquant
