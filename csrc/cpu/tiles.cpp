// Products with packed weights by tiles of Intel's AMX: an instruction multiplies 16 tokens with 64 columns of 16 rows.
//
// A step of a panel, its nibbles apart and the zero points subtracted, is what two rows of a tile of weights hold. That
// is done once for a block of columns, and then all tokens pass it. Sums are the same integers as in rows.cpp, and
// become floats in the same order: so do the results.

#include <immintrin.h>

#include "panel.h"

namespace llmquant {
namespace {

constexpr int64_t TILE = 16;         // tokens, and rows: a panel
constexpr int64_t ROW = 64;          // bytes of a row of a tile
constexpr int64_t FEW = 8;           // tokens; for fewer, vectors are faster
constexpr int64_t MANY = 128;        // tokens whose totals stay in the first-level cache
constexpr int64_t CACHED = 1 << 20;  // bytes of x that stay in the second-level cache while the panels pass
constexpr int PANELS = 4;            // that are multiplied at once

using Bytes = uint8_t __attribute__((vector_size(ROW)));  // a difference wraps around, to a signed byte

// What tiles will read is in memory: the instructions do not tell the compiler that they read it.
void stored() { __asm__ volatile("" ::: "memory"); }

struct alignas(64) Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Columns to an instruction.
int64_t depth(const LlmquantLinear& task) { return block_of(task) % ROW ? ROW / 2 : ROW; }

// Tiles 0..3 hold sums, 4 activations, 5..7 weights.
void configure(const LlmquantLinear& task, int64_t tokens) {
    Configuration tiles;
    for (int tile = 0; tile < 8; ++tile) {
        tiles.rows[tile] = static_cast<uint8_t>(tile < 5 ? tokens : depth(task) / 4);
        tiles.row_bytes[tile] = static_cast<uint16_t>(tile == 4 ? depth(task) : ROW);
    }
    stored();
    _tile_loadconfig(&tiles);
}

// Columns [first, first + count) of a panel as signed bytes, four to a row of a tile; what is missing becomes zero.
template <int BITS>
void unpack(const LlmquantLinear& task, int64_t panel, int64_t first, int64_t count, int8_t* to) {
    Int zero = Grid::zero(task, panel, first / task.group, 0);
    zero |= zero << 8;
    zero |= zero << 16;
    const int8_t* end = to + LLMQUANT_BLOCK_MOST * PANEL;
    const uint8_t* from = task.codes + panel * offset<BITS>(padded(task.columns)) + offset<BITS>(first);
    for (const uint8_t* last = from + offset<BITS>(count); from < last; from += STEP) {
        const Int bytes = load<Int>(from);
        store(to, (Bytes)(BITS == 4 ? low_nibbles(bytes) : bytes) - (Bytes)zero);
        to += ROW;
        if (BITS == 4) {
            store(to, (Bytes)high_nibbles(bytes) - (Bytes)zero);
            to += ROW;
        }
    }
    for (; to < end; to += ROW) store(to, Bytes{});
    stored();
}

using Sums = int32_t[PANELS][TILE][PANEL];

// Some tokens with four panels.
template <int BITS, int PLANES>
class Strip {
  public:
    Strip(const LlmquantLinear& task_, const Integers& x_, int64_t first_, int64_t count_)
        : task(task_), x(x_), first(first_), count(count_), height(min(TILE, count_)) {}

    void multiply(const int64_t (&panels)[PANELS]) {
        const int64_t block = block_of(task), tiles = ceil_div(count, TILE);
        for (int64_t slot = 0; slot < tiles * TILE; ++slot)
            for (Float& total : totals[slot]) total = Float{};
        Pending last = {};
        for (int64_t b = 0, turn = 0; b < blocks; ++b) {
            const int64_t column = b * block, columns = min(block, padded(task.columns) - column);
            Pending next = {};
            for (int p = 0; p < PANELS; ++p) {
                unpack<BITS>(task, panels[p], column, columns, weights[p]);
                next.scales[p] = Grid::scale(task, panels[p], column / task.group, 0);
            }
            for (int64_t tile = 0; tile < tiles; ++tile, turn ^= 1) {
                next.sums = sums[turn];
                next.totals = totals + tile * TILE;
                next.x_scales = x.scales + start(tile) * blocks + b;
                multiply_block(start(tile), column, columns, next, last);
                last = next;
            }
        }
        add(last, 0, height);
        write(panels[0] * PANEL, min((panels[PANELS - 1] + 1) * PANEL, task.rows), tiles);
    }

  private:
    // Products of a block that are computed, but not yet in the totals.
    struct Pending {
        Sums* sums;  // of each plane
        Float (*totals)[PANELS];
        const float* x_scales;
        Float scales[PANELS];
    };

    // The last tile begins early enough to be whole. What it computes again comes out the same.
    int64_t start(int64_t tile) const { return first + min(tile * TILE, count - height); }

    // A tile of tokens with the panels. The processor does not look far ahead, so between its products stand the vector
    // operations that the tile before has left.
    void multiply_block(int64_t token, int64_t column, int64_t columns, const Pending& next, const Pending& last) {
        const int64_t stride = PLANES * padded(task.columns);
        int64_t row = 0;
        for (int plane = 0; plane < PLANES; ++plane) {
            const int8_t* from = x.planes + token * stride + plane * stride / PLANES + column;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t done = 0; done < columns; done += deep) {
                const int8_t* w = weights[0] + done * PANEL;
                _tile_loadd(4, from + done, stride);
                _tile_loadd(5, w, ROW);
                _tile_dpbssd(0, 4, 5);
                _tile_loadd(6, w + NEXT, ROW);
                _tile_dpbssd(1, 4, 6);
                row = add(last, row, row + share);
                _tile_loadd(7, w + 2 * NEXT, ROW);
                _tile_dpbssd(2, 4, 7);
                _tile_loadd(5, w + 3 * NEXT, ROW);
                _tile_dpbssd(3, 4, 5);
                row = add(last, row, row + share);
            }
            auto& to = next.sums[plane];
            _tile_stored(0, to[0], ROW);
            _tile_stored(1, to[1], ROW);
            _tile_stored(2, to[2], ROW);
            _tile_stored(3, to[3], ROW);
        }
        add(last, row, height);
    }

    // Tokens [from, until) of the tile that is pending; where to go on.
    int64_t add(const Pending& pending, int64_t from, int64_t until) {
        if (!pending.sums) return from;
        if (until > height) until = height;
        for (; from < until; ++from)
            for (int p = 0; p < PANELS; ++p) {
                Int sum = load<Int>(pending.sums[0][p][from]);
                if (PLANES == 2) sum = (sum << 7) + load<Int>(pending.sums[1][p][from]);
                pending.totals[from][p] +=
                    __builtin_convertvector(sum, Float) * (pending.scales[p] * pending.x_scales[from * blocks]);
            }
        return from;
    }

    // Rows [row, end) of the result.
    void write(int64_t row, int64_t end, int64_t tiles) const {
        const int64_t rows = end - row;
        float bias[PANELS * PANEL] = {};
        if (task.bias) read(task.bias, task.bias_kind, row, rows, bias);
        for (int64_t tile = 0; tile < tiles; ++tile)
            for (int64_t t = 0; t < height; ++t) {
                float values[PANELS * PANEL];
                for (int p = 0; p < PANELS; ++p)
                    store(values + p * PANEL, totals[tile * TILE + t][p] + load<Float>(bias + p * PANEL));
                llmquant::write(values, task.y, task.x_kind, (start(tile) + t) * task.rows + row, rows);
            }
    }

    static constexpr int64_t NEXT = LLMQUANT_BLOCK_MOST * PANEL;

    const LlmquantLinear& task;
    const Integers& x;
    const int64_t first, count, height;
    const int64_t blocks = blocks_of(task), deep = depth(task);
    const int64_t share = ceil_div(height, 2 * PLANES * ceil_div(block_of(task), deep));
    alignas(64) int8_t weights[PANELS][NEXT];
    alignas(64) Sums sums[2][PLANES];  // of which one is pending: what tiles have stored can be read after a while only
    Float totals[MANY][PANELS];
};

template <int BITS, int PLANES>
void multiply(const LlmquantLinear& task, const Integers& x, int64_t first, int64_t last) {
    const int64_t some = min(MANY, max(TILE, CACHED / (padded(task.columns) * PLANES)));
    const int64_t strips = ceil_div(task.tokens, some);
    for (int64_t strip = 0; strip < strips; ++strip) {
        const int64_t begin = task.tokens * strip / strips, end = task.tokens * (strip + 1) / strips;
        Strip<BITS, PLANES> tokens(task, x, begin, end - begin);
        configure(task, min(TILE, end - begin));
        for (int64_t panel = first; panel < last; panel += PANELS) {
            const int64_t end = last - 1;  // it may go more than once
            tokens.multiply({panel, min(panel + 1, end), min(panel + 2, end), min(panel + 3, end)});
        }
    }
    _tile_release();
}

void multiply_any(const LlmquantLinear& task, const Integers& x, int64_t first, int64_t last) {
    // An 8-bit code less a zero point of its own may need 9 bits.
    if (task.tokens < FEW || (task.bits == 8 && task.zeros)) return avx512vnni::linear.multiply(task, x, first, last);
    if (task.bits == 4)
        task.planes == 1 ? multiply<4, 1>(task, x, first, last) : multiply<4, 2>(task, x, first, last);
    else
        task.planes == 1 ? multiply<8, 1>(task, x, first, last) : multiply<8, 2>(task, x, first, last);
}

void to_integers(const LlmquantLinear& task, const Integers& x, int64_t first, int64_t last) {
    avx512vnni::linear.to_integers(task, x, first, last);
}

}  // namespace

namespace LLMQUANT_LEVEL {
const LinearKernels linear = {to_integers, multiply_any};
}

}  // namespace llmquant
