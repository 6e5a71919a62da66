// Products with packed weights by tiles of Intel's AMX: an instruction multiplies 16 tokens with 64 columns of 16 rows.
//
// A step of a panel, its nibbles apart and the zero points subtracted, is what two rows of a tile of weights hold. That
// is done once for a block of columns, and then all tokens pass it. Sums are the same integers as in rows.cpp, and
// become floats in the same order: so do the results.

#include "amx.h"
#include "integers.h"
#include "panel.h"

namespace llmquant {
namespace {

constexpr int64_t TILE = LLMQUANT_TILE;  // tokens, and rows: a panel
constexpr int64_t FEW = 6;               // tokens; for fewer, vectors are faster
constexpr int64_t MANY = 8;              // tiles of tokens whose totals stay in the first-level cache
constexpr int64_t CACHED = 1 << 20;      // bytes of x (or y) that stay in the second-level cache while the panels pass
constexpr int PANELS = 4;                // that are multiplied at once

using Bytes = uint8_t __attribute__((vector_size(ROW)));  // a difference wraps around, to a signed byte

// An 8-bit code less a zero point of its own may need 9 bits.
bool by_tiles(const LlmquantLinear& task) { return task.tokens >= FEW && !(task.bits == 8 && task.zeros); }

// Columns to an instruction.
int64_t depth(const LlmquantLinear& task) { return block_of(task) % ROW ? ROW / 2 : ROW; }

int64_t tiles_of(const LlmquantLinear& task) { return ceil_div(task.tokens, TILE); }

// Where activations of a tile of tokens stand: [tiles][columns / depth][planes][TILE][depth], so that a tile of AMX is
// one piece of memory.
template <int PLANES>
int64_t place(const LlmquantLinear& task, int64_t tile, int64_t column) {
    const int64_t deep = depth(task);
    return (tile * ceil_div(task.columns, deep) + column / deep) * PLANES * TILE * deep;
}

// Of a tile of tokens: only as many are multiplied.
int64_t tokens_at_once(const LlmquantLinear& task) { return min(TILE, task.tokens); }

// Tiles 0..3 hold sums, 4 activations, 5..7 weights.
void configure(const LlmquantLinear& task) {
    Configuration tiles;
    for (int tile = 0; tile < 8; ++tile) {
        tiles.rows[tile] = static_cast<uint8_t>(tile < 5 ? tokens_at_once(task) : depth(task) / 4);
        tiles.row_bytes[tile] = static_cast<uint16_t>(tile == 4 ? depth(task) : ROW);
    }
    stored();
    _tile_loadconfig(&tiles);
}

// Activations of tokens [first, last) to integers.
template <int PLANES>
void to_tiles(const LlmquantLinear& task, const Integers& x, int64_t first, int64_t last) {
    const int64_t block = block_of(task), blocks = blocks_of(task), deep = depth(task);
    if (last == task.tokens) last = tiles_of(task) * TILE;  // those that are missing are zeros
    for (int64_t t = first; t < last; ++t)
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t start = b * block, count = min(block, task.columns - start);
            float values[LLMQUANT_BLOCK_MOST];
            read(task.x, task.x_kind, t * task.columns + start, t < task.tokens ? count : 0, values);
            int8_t* to = x.planes + place<PLANES>(task, t / TILE, start) + t % TILE * deep;
            block_to_integers<PLANES>(
                values, ceil_div(count, deep) * deep,
                [&](int plane, int64_t i) {
                    return to + (i & -deep) * PLANES * TILE + plane * TILE * deep + (i & (deep - 1));
                },
                x.scales + t * blocks + b, x.sums + t * blocks + b);
        }
}

// Columns [first, first + count) of a panel as signed bytes, four to a row of a tile; what is missing becomes zero.
template <int BITS>
void unpack(const LlmquantLinear& task, int64_t panel, int64_t first, int64_t count, int8_t* to) {
    Int zero = Grid::zero(task, panel, first / task.group, 0);
    zero |= zero << 8;
    zero |= zero << 16;
    const int8_t* end = to + ceil_div(count, depth(task)) * depth(task) * PANEL;
    const uint8_t* from = task.codes + panel * offset<BITS>(padded(task.columns)) + offset<BITS>(first);
    for (const uint8_t* last = from + offset<BITS>(count); from < last; from += STEP) {
        const Int bytes = load<Int>(from);
        __builtin_prefetch(from + offset<BITS>(LLMQUANT_BLOCK_MOST));  // of the next block
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

// Whole lines of memory, which the caches need not fetch before.
void write_past_caches(const float (&from)[PANELS * PANEL], void* to, int64_t kind, int64_t at) {
    if (kind == LLMQUANT_FP32) {
        for (int i = 0; i < PANELS * PANEL; i += LANES)
            _mm512_stream_ps(static_cast<float*>(to) + at + i, load<__m512>(from + i));
        return;
    }
    for (int i = 0; i < PANELS * PANEL; i += 2 * LANES) {
        const __m512i low = (__m512i)to_half(load<Float>(from + i), kind);
        const __m512i high = (__m512i)to_half(load<Float>(from + i + LANES), kind);
        const __m512i words = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(low));
        _mm512_stream_si512(reinterpret_cast<__m512i*>(static_cast<uint16_t*>(to) + at + i),
                            _mm512_inserti64x4(words, _mm512_cvtepi32_epi16(high), 1));
    }
}

using Sums = int32_t[PANELS][TILE][PANEL];

// Tiles [first, last) of tokens with four panels.
template <int BITS, int PLANES>
class Strip {
  public:
    Strip(const LlmquantLinear& task_, const Integers& x_, int64_t first_, int64_t last_)
        : task(task_), x(x_), first(first_), last(last_) {}

    void multiply(const int64_t (&panels)[PANELS]) {
        const int64_t block = block_of(task);
        for (int64_t slot = 0; slot < (last - first) * TILE; ++slot)
            for (Float& total : totals[slot]) total = Float{};
        Pending before = {};
        for (int64_t b = 0, turn = 0; b < blocks; ++b) {
            const int64_t column = b * block, columns = min(block, padded(task.columns) - column);
            Pending next = {};
            for (int p = 0; p < PANELS; ++p) {
                unpack<BITS>(task, panels[p], column, columns, weights[p]);
                next.scales[p] = Grid::scale(task, panels[p], column / task.group, 0);
            }
            for (int64_t tile = first; tile < last; ++tile, turn ^= 1) {
                next.sums = sums[turn];
                next.totals = totals + (tile - first) * TILE;
                next.x_scales = x.scales + tile * TILE * blocks + b;
                multiply_block(x.planes + place<PLANES>(task, tile, column), columns, next, before);
                before = next;
            }
        }
        add(before, 0, some);
        write(panels[0] * PANEL, min((panels[PANELS - 1] + 1) * PANEL, task.rows));
    }

  private:
    // Products of a block that are computed, but not yet in the totals.
    struct Pending {
        Sums* sums;  // of each plane
        Float (*totals)[PANELS];
        const float* x_scales;
        Float scales[PANELS];
    };

    // A tile of tokens with the panels. The processor does not look far ahead, so between its products stand the vector
    // operations that the tile before has left.
    void multiply_block(const int8_t* from, int64_t columns, const Pending& next, const Pending& before) {
        int64_t row = 0;
        for (int plane = 0; plane < PLANES; ++plane, from += TILE * deep) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t done = 0; done < columns; done += deep) {
                const int8_t* w = weights[0] + done * PANEL;
                _tile_loadd(4, from + done * PLANES * TILE, deep);
                _tile_loadd(5, w, ROW);
                _tile_dpbssd(0, 4, 5);
                _tile_loadd(6, w + NEXT, ROW);
                _tile_dpbssd(1, 4, 6);
                row = add(before, row, row + share);
                _tile_loadd(7, w + 2 * NEXT, ROW);
                _tile_dpbssd(2, 4, 7);
                _tile_loadd(5, w + 3 * NEXT, ROW);
                _tile_dpbssd(3, 4, 5);
                row = add(before, row, row + share);
            }
            auto& to = next.sums[plane];
            _tile_stored(0, to[0], ROW);
            _tile_stored(1, to[1], ROW);
            _tile_stored(2, to[2], ROW);
            _tile_stored(3, to[3], ROW);
        }
        add(before, row, some);
    }

    // Tokens [from, until) of the tile that is pending; where to go on.
    int64_t add(const Pending& pending, int64_t from, int64_t until) {
        if (!pending.sums) return from;
        Float scales[PANELS];  // a copy: for all the compiler knows, a total may be one of them
        for (int p = 0; p < PANELS; ++p) scales[p] = pending.scales[p];
        for (until = min(until, some); from < until; ++from) {
            const float x_scale = pending.x_scales[from * blocks];
            Float* totals = pending.totals[from];
            Float t[PANELS];
            for (int p = 0; p < PANELS; ++p) {
                Int sum = load<Int>(pending.sums[0][p][from]);
                if (PLANES == 2) sum = (sum << 7) + load<Int>(pending.sums[1][p][from]);
                t[p] = totals[p] + __builtin_convertvector(sum, Float) * (scales[p] * x_scale);
            }
            for (int p = 0; p < PANELS; ++p) totals[p] = t[p];
        }
        return from;
    }

    // Rows [row, end) of the result.
    void write(int64_t row, int64_t end) const {
        float bias[PANELS * PANEL] = {};
        if (task.bias) read(task.bias, task.bias_kind, row, end - row, bias);
        // All four panels of every token are whole lines of memory, of more than would stay in a cache anyway.
        const int64_t width = task.rows * bytes_of(task.x_kind);
        const bool past_caches =
            task.tokens * width > CACHED && width % ROW == 0 && reinterpret_cast<uintptr_t>(task.y) % ROW == 0;
        for (int64_t t = first * TILE; t < min(last * TILE, task.tokens); ++t) {
            float values[PANELS * PANEL];
            for (int p = 0; p < PANELS; ++p)
                store(values + p * PANEL, totals[t - first * TILE][p] + load<Float>(bias + p * PANEL));
            if (end - row == PANELS * PANEL && past_caches)
                write_past_caches(values, task.y, task.x_kind, t * task.rows + row);
            else
                llmquant::write(values, task.y, task.x_kind, t * task.rows + row, end - row);
        }
    }

    static constexpr int64_t NEXT = LLMQUANT_BLOCK_MOST * PANEL;

    const LlmquantLinear& task;
    const Integers& x;
    const int64_t first, last;
    const int64_t blocks = blocks_of(task), deep = depth(task);
    const int64_t some = tokens_at_once(task);
    const int64_t share = ceil_div(some, 2 * PLANES * ceil_div(block_of(task), deep));
    alignas(64) int8_t weights[PANELS][NEXT];
    alignas(64) Sums sums[2][PLANES];  // of which one is pending: what tiles have stored can be read after a while only
    Float totals[MANY * TILE][PANELS];
};

template <int BITS, int PLANES>
void multiply(const LlmquantLinear& task, const Integers& x, int64_t first, int64_t last) {
    const int64_t tiles = tiles_of(task);
    const int64_t some = min(MANY, max(1, CACHED / (padded(task.columns) * PLANES * TILE)));
    const int64_t strips = ceil_div(tiles, some);
    configure(task);
    for (int64_t strip = 0; strip < strips; ++strip) {
        Strip<BITS, PLANES> tokens(task, x, tiles * strip / strips, tiles * (strip + 1) / strips);
        for (int64_t panel = first; panel < last; panel += PANELS) {
            const int64_t end = last - 1;  // it may go more than once
            tokens.multiply({panel, min(panel + 1, end), min(panel + 2, end), min(panel + 3, end)});
        }
    }
    _mm_sfence();  // what went past the caches is there for whoever comes next
    _tile_release();
}

void multiply_any(const LlmquantLinear& task, const Integers& x, int64_t first, int64_t last) {
    if (!by_tiles(task)) return avx512vnni::linear.multiply(task, x, first, last);
    if (task.bits == 4)
        task.planes == 1 ? multiply<4, 1>(task, x, first, last) : multiply<4, 2>(task, x, first, last);
    else
        task.planes == 1 ? multiply<8, 1>(task, x, first, last) : multiply<8, 2>(task, x, first, last);
}

void to_integers(const LlmquantLinear& task, const Integers& x, int64_t first, int64_t last) {
    if (!by_tiles(task)) return avx512vnni::linear.to_integers(task, x, first, last);
    task.planes == 1 ? to_tiles<1>(task, x, first, last) : to_tiles<2>(task, x, first, last);
}

}  // namespace

namespace LLMQUANT_LEVEL {
const LinearKernels linear = {to_integers, multiply_any};
}

}  // namespace llmquant
