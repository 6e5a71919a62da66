// Products of tokens with a dense weight in bf16 by tiles of Intel's AMX: an instruction multiplies 16 rows with 32
// columns of 16 tokens. However few the tokens are: then memory sets the time, and one token has the bits that it has
// among many.

#include "amx.h"
#include "dense.h"
#include "numbers.h"

namespace llmquant {
namespace {

constexpr int64_t TILE = 16;               // rows, and tokens
constexpr int64_t DEPTH = ROW / 2;         // columns to an instruction
constexpr int64_t WORDS = TILE * ROW / 4;  // of a tile of tokens: pairs of columns
constexpr int64_t AT_ONCE = 4;             // tiles of tokens that pass a tile of weights

bool by_tiles(const LlmquantDense& task) { return task.kind == LLMQUANT_BF16 && task.columns % DEPTH == 0; }

int64_t tiles_of(const LlmquantDense& task) { return ceil_div(task.tokens, TILE); }

int64_t steps_of(const LlmquantDense& task) { return task.columns / DEPTH; }

int64_t room(const LlmquantDense& task) {
    return by_tiles(task) ? tiles_of(task) * steps_of(task) * WORDS * 4 : avx512::dense.room(task);
}

// Tokens as [tiles][steps][pairs of columns][tokens].
void prepare(const LlmquantDense& task, void* x) {
    if (!by_tiles(task)) return avx512::dense.prepare(task, x);
    const auto* from = static_cast<const char*>(task.x);
    auto* to = static_cast<uint32_t*>(x);
    const int64_t pairs = task.columns / 2, each = steps_of(task) * WORDS;
    for (int64_t t = 0; t < tiles_of(task) * TILE; ++t)
        for (int64_t i = 0; i < pairs; ++i) {
            uint32_t pair = 0;
            if (t < task.tokens) __builtin_memcpy(&pair, from + (t * pairs + i) * 4, 4);
            to[t / TILE * each + i * TILE + t % TILE] = pair;
        }
}

// Sums of 16 rows with 16 tokens to the result: `count` of these rows, from `row` on.
void write_tile(const LlmquantDense& task, const float (&sums)[TILE][TILE], int64_t token, int64_t row, int64_t count) {
    for (int64_t t = 0; t < min(TILE, task.tokens - token); ++t) {
        float values[TILE];
        for (int64_t r = 0; r < TILE; ++r) values[r] = sums[r][t];
        write(values, task.y, task.kind, (token + t) * task.rows + row, count);
    }
}

// 16 rows, `count` of which are there, with TILES tiles of tokens from `tile` on. x is the first of these.
template <int TILES>
void multiply_rows(const LlmquantDense& task, const uint32_t* x, int64_t tile, int64_t row, int64_t count) {
    const int64_t steps = steps_of(task), width = 2 * task.columns;
    const auto* w = static_cast<const char*>(task.w) + row * width;
    alignas(64) char rest[TILE][ROW] = {};
    _tile_zero(0);
    if (TILES > 1) _tile_zero(1);
    if (TILES > 2) _tile_zero(2);
    if (TILES > 3) _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step, x += WORDS) {
        if (count == TILE) {
            _tile_loadd(4, w + step * ROW, width);
            // The rows that follow, in the order in which they stand there.
            const char* next = w + TILE * width + step * TILE * ROW;
            for (int64_t line = 0; line < TILE; ++line) __builtin_prefetch(next + line * ROW, 0, 2);
        } else {
            for (int64_t r = 0; r < count; ++r) __builtin_memcpy(rest[r], w + r * width + step * ROW, ROW);
            stored();
            _tile_loadd(4, rest, ROW);
        }
        _tile_loadd(5, x, ROW);
        _tile_dpbf16ps(0, 4, 5);
        if (TILES > 1) {
            _tile_loadd(6, x + steps * WORDS, ROW);
            _tile_dpbf16ps(1, 4, 6);
        }
        if (TILES > 2) {
            _tile_loadd(7, x + 2 * steps * WORDS, ROW);
            _tile_dpbf16ps(2, 4, 7);
        }
        if (TILES > 3) {
            _tile_loadd(5, x + 3 * steps * WORDS, ROW);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
    alignas(64) float sums[TILES][TILE][TILE];
    _tile_stored(0, sums[0], ROW);
    if (TILES > 1) _tile_stored(1, sums[1 % TILES], ROW);
    if (TILES > 2) _tile_stored(2, sums[2 % TILES], ROW);
    if (TILES > 3) _tile_stored(3, sums[3 % TILES], ROW);
    stored();
    for (int i = 0; i < TILES; ++i) write_tile(task, sums[i], (tile + i) * TILE, row, count);
}

void multiply(const LlmquantDense& task, const void* x, int64_t first, int64_t last) {
    if (!by_tiles(task)) return avx512::dense.multiply(task, x, first, last);
    Configuration tiles;
    for (int tile = 0; tile < 8; ++tile) tiles.rows[tile] = TILE, tiles.row_bytes[tile] = ROW;
    stored();
    _tile_loadconfig(&tiles);
    for (int64_t row = first; row < last; row += TILE)
        for (int64_t tile = 0; tile < tiles_of(task); tile += AT_ONCE) {
            const auto* from = static_cast<const uint32_t*>(x) + tile * steps_of(task) * WORDS;
            const int64_t rows = min(TILE, last - row), some = min(AT_ONCE, tiles_of(task) - tile);
            if (some == 1) multiply_rows<1>(task, from, tile, row, rows);
            if (some == 2) multiply_rows<2>(task, from, tile, row, rows);
            if (some == 3) multiply_rows<3>(task, from, tile, row, rows);
            if (some == 4) multiply_rows<4>(task, from, tile, row, rows);
        }
    _tile_release();
}

}  // namespace

namespace LLMQUANT_LEVEL {
const DenseKernels dense = {room, prepare, multiply};
}

}  // namespace llmquant
