// The loops of the solvers, for the instruction set that the build names in LLMQUANT_LEVEL.
//
// A tile is some rows of the weight, one to a lane, through a block of columns: it stays in the first-level cache
// while each column is rounded and its error passed on to the columns after it.

#include "solve.h"
#include "vectors.h"

namespace llmquant {
namespace {

constexpr int64_t WIDTH = 2;  // vectors of rows in a tile
constexpr int64_t ROWS = WIDTH * LANES;
constexpr int64_t STRIP = 4;  // columns whose errors reach the later columns together, one load and store for all
constexpr int64_t BLOCK = LLMQUANT_BLOCK;

constexpr float SMALLEST_SCALE = 1.0f / 16384;  // the smallest normal fp16
constexpr float LARGEST_SCALE = 65280.0f;       // the largest value exact in both fp16 and bf16

Float larger(Float a, Float b) { return a > b ? a : b; }
Float smaller(Float a, Float b) { return a < b ? a : b; }
Float all(float value) { return Float{} + value; }

// To the nearest integer, halves to even, of anything below 2^22: adding 1.5 * 2^23 leaves no bit for a fraction.
Float nearest_integer(Float x) { return (x + 12582912.0f) - 12582912.0f; }

// To eight significant bits, halves to even: exact in bf16 and, in its normal range, in fp16. `x` is positive.
Float representable(Float x) {
    const Int bits = (Int)x;
    const Float rounded = (Float)((bits + 0x7fff + ((bits >> 16) & 1)) & ~0xffff);
    return smaller(larger(rounded, all(SMALLEST_SCALE)), all(LARGEST_SCALE));
}

// Where the codes of some rows stand: the value of code c is scale * (c - zero), with zero = -low.
struct Grid {
    Float scale, inverse, low, high;  // low and high: the integers `code - zero` can be

    Grid() = default;
    Grid(Float scale_, Float zero, float top) : scale(scale_), inverse(1.0f / scale_), low(-zero), high(top - zero) {}

    Float integer(Float x) const { return nearest_integer(smaller(larger(x * inverse, low), high)); }
};

// The grid over `range` shrunk as the candidate says. A negative scale is a symmetric grid whose longer side is up.
Grid grid_over(const LlmquantColumns& task, Float low, Float high, const LlmquantCandidate& candidate) {
    const float top = static_cast<float>((1 << task.bits) - 1);
    low *= candidate.low;
    high *= candidate.high;
    if (!task.symmetric) {
        const Float scale = representable((high - low) * (1.0f / top));
        const Float zero = nearest_integer(-low / larger((high - low) * (1.0f / top), all(SMALLEST_SCALE)));
        return Grid(scale, smaller(larger(zero, all(0)), all(top)), top);
    }
    const float middle = static_cast<float>(1 << (task.bits - 1));
    const bool up = candidate.sign < 0;
    const Float longer = up ? high : -low, shorter = up ? -low : high;
    const Float scale = representable(larger(longer * (1.0f / middle), shorter * (1.0f / (middle - 1))));
    return Grid(scale * candidate.sign, all(middle), top);
}

// Rounding the columns of one group one after the other, each vector of rows on its grid.
class Trial {
  public:
    Trial(const LlmquantColumns& task_, const Float (*columns)[WIDTH], int64_t first_, int64_t width_,
          const Grid* grids_)
        : task(task_), first(first_), width(width_), grids(grids_) {
        for (int64_t j = 0; j < width; ++j)
            for (int64_t v = 0; v < WIDTH; ++v) rest[j][v] = columns[first + j][v];
    }

    // The sums of squared normalised errors.
    void run(Float* losses) {
        for (int64_t v = 0; v < WIDTH; ++v) losses[v] = all(0);
        int64_t j = 0;
        for (; j + STRIP <= width; j += STRIP) take<STRIP>(j, losses);
        for (; j < width; ++j) take<1>(j, losses);
    }

  private:
    // Rounds `COUNT` columns from `start` on, and passes their errors on to all after them.
    template <int64_t COUNT>
    void take(int64_t start, Float* losses) {
        const float* rows = task.matrix + (first + start) * task.stride + first;
        Float errors[COUNT][WIDTH];
        for (int64_t j = 0; j < COUNT; ++j) {
            for (int64_t v = 0; v < WIDTH; ++v) {
                const Float x = rest[start + j][v];
                errors[j][v] = (x - grids[v].scale * grids[v].integer(x)) * task.pivots[first + start + j];
                losses[v] += errors[j][v] * errors[j][v];
            }
            for (int64_t l = j + 1; l < COUNT; ++l)
                for (int64_t v = 0; v < WIDTH; ++v)
                    rest[start + l][v] -= errors[j][v] * rows[j * task.stride + start + l];
        }
        for (int64_t l = start + COUNT; l < width; ++l) {
            Float x[WIDTH];
            for (int64_t v = 0; v < WIDTH; ++v) x[v] = rest[l][v];
            for (int64_t j = 0; j < COUNT; ++j)
                for (int64_t v = 0; v < WIDTH; ++v) x[v] -= errors[j][v] * rows[j * task.stride + l];
            for (int64_t v = 0; v < WIDTH; ++v) rest[l][v] = x[v];
        }
    }

    const LlmquantColumns& task;
    const int64_t first, width;
    const Grid* grids;
    Float rest[BLOCK][WIDTH];
};

// The best of the candidates for each row.
void search_grid(const LlmquantColumns& task, const Float (*columns)[WIDTH], int64_t first, int64_t width, Grid* best) {
    Float low[WIDTH] = {}, high[WIDTH] = {}, least[WIDTH];
    for (int64_t j = 0; j < width; ++j)
        for (int64_t v = 0; v < WIDTH; ++v) {
            low[v] = smaller(low[v], columns[first + j][v]);
            high[v] = larger(high[v], columns[first + j][v]);
        }
    for (int64_t v = 0; v < WIDTH; ++v) least[v] = all(__builtin_huge_valf());
    for (int64_t c = 0; c < task.candidate_count; ++c) {
        Grid grids[WIDTH];
        Float losses[WIDTH];
        for (int64_t v = 0; v < WIDTH; ++v) grids[v] = grid_over(task, low[v], high[v], task.candidates[c]);
        Trial(task, columns, first, width, grids).run(losses);
        for (int64_t v = 0; v < WIDTH; ++v) {
            const Int better = losses[v] < least[v];
            least[v] = better ? losses[v] : least[v];
            best[v].scale = better ? grids[v].scale : best[v].scale;
            best[v].inverse = better ? grids[v].inverse : best[v].inverse;
            best[v].low = better ? grids[v].low : best[v].low;
            best[v].high = better ? grids[v].high : best[v].high;
        }
    }
}

// `count` rows from `first` on; the lanes after them are idle and hold zeros.
void copy_in(const float* from, int64_t count, Float* to) {
    float lanes[ROWS] = {};
    copy(lanes, from, count);
    for (int64_t v = 0; v < WIDTH; ++v) to[v] = load<Float>(lanes + v * LANES);
}

void copy_out(const Float* from, int64_t count, float* to) {
    float lanes[ROWS];
    for (int64_t v = 0; v < WIDTH; ++v) store(lanes + v * LANES, from[v]);
    copy(to, lanes, count);
}

class Tile {
  public:
    Tile(const LlmquantColumns& task_, int64_t row_) : task(task_), row(row_), count(min(ROWS, task_.rows - row_)) {
        for (int64_t j = 0; j < task.columns; ++j) copy_in(task.work + j * task.rows + row, count, columns[j]);
    }

    void round() {
        for (int64_t strip = 0; strip < task.columns; strip += STRIP) {
            const int64_t end = min(strip + STRIP, task.columns);
            for (int64_t j = strip; j < end; ++j) {
                if (j % task.group == 0) enter(j);
                round_column(j);
                for (int64_t l = j + 1; l < end; ++l)
                    for (int64_t v = 0; v < WIDTH; ++v)
                        columns[l][v] -= columns[j][v] * task.matrix[j * task.stride + l];
            }
            for (int64_t l = end; l < task.columns; ++l)
                for (int64_t v = 0; v < WIDTH; ++v) {
                    Float x = columns[l][v];
                    for (int64_t j = strip; j < end; ++j) x -= columns[j][v] * task.matrix[j * task.stride + l];
                    columns[l][v] = x;
                }
        }
        for (int64_t j = 0; j < task.columns; ++j) copy_out(columns[j], count, task.work + j * task.rows + row);
    }

  private:
    // The grid of the group that starts at column j: searched for, or as it was given.
    void enter(int64_t j) {
        float* scales = task.scales + j / task.group * task.rows + row;
        float* zeros = task.zeros + j / task.group * task.rows + row;
        Float scale[WIDTH], zero[WIDTH];
        if (task.candidate_count) {
            search_grid(task, columns, j, min(task.group, task.columns - j), grids);
            for (int64_t v = 0; v < WIDTH; ++v) {
                scale[v] = grids[v].scale;
                zero[v] = -grids[v].low;
            }
            copy_out(scale, count, scales);
            copy_out(zero, count, zeros);
            return;
        }
        copy_in(scales, count, scale);
        copy_in(zeros, count, zero);
        for (int64_t v = 0; v < WIDTH; ++v)
            grids[v] = Grid(scale[v], zero[v], static_cast<float>((1 << task.bits) - 1));
    }

    // Replaces column j by what the later columns are to feel of it.
    void round_column(int64_t j) {
        uint8_t* codes = task.codes + j * task.rows + row;
        for (int64_t v = 0; v < WIDTH; ++v) {
            const Grid& grid = grids[v];
            const Float x = columns[j][v];
            Float integer;
            if (task.descend) {
                Float before = {};
                for (int64_t i = 0; i < LANES; ++i)
                    if (v * LANES + i < count) before[i] = codes[v * LANES + i];
                before = (before + grid.low) * grid.scale;
                integer = grid.integer(before + x * task.pivots[j]);
                columns[j][v] = grid.scale * integer - before;
            } else {
                integer = grid.integer(x);
                columns[j][v] = (x - grid.scale * integer) * task.pivots[j];
            }
            const Int code = __builtin_convertvector(integer - grid.low, Int);
            for (int64_t i = 0; i < LANES; ++i)
                if (v * LANES + i < count) codes[v * LANES + i] = static_cast<uint8_t>(code[i]);
        }
    }

    const LlmquantColumns& task;
    const int64_t row, count;
    Grid grids[WIDTH];
    Float columns[BLOCK][WIDTH];
};

void round_columns(const LlmquantColumns& task, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row += ROWS) Tile(task, row).round();
}

// Columns of any number share a grid: every candidate's loss is kept while they pass, once.
void search_vector(const LlmquantColumns& task, int64_t row, int64_t group) {
    const int64_t count = min(LANES, task.rows - row), first = group * task.group;
    const int64_t last = min(task.columns, first + task.group);
    const auto column = [&](int64_t j) {
        float lanes[LANES] = {};
        copy(lanes, task.work + j * task.rows + row, count);
        return load<Float>(lanes);
    };
    Float low = {}, high = {};
    for (int64_t j = first; j < last; ++j) {
        low = smaller(low, column(j));
        high = larger(high, column(j));
    }
    Grid grids[LLMQUANT_CANDIDATES];
    Float losses[LLMQUANT_CANDIDATES] = {};
    for (int64_t c = 0; c < task.candidate_count; ++c) grids[c] = grid_over(task, low, high, task.candidates[c]);
    for (int64_t j = first; j < last; ++j) {
        const Float x = column(j);
        for (int64_t c = 0; c < task.candidate_count; ++c) {
            const Float error = (x - grids[c].scale * grids[c].integer(x)) * task.pivots[j];
            losses[c] += error * error;
        }
    }
    Float least = losses[0], scale = grids[0].scale, zero = -grids[0].low;
    for (int64_t c = 1; c < task.candidate_count; ++c) {
        const Int better = losses[c] < least;
        least = better ? losses[c] : least;
        scale = better ? grids[c].scale : scale;
        zero = better ? -grids[c].low : zero;
    }
    copy(task.scales + group * task.rows + row, reinterpret_cast<const float*>(&scale), count);
    copy(task.zeros + group * task.rows + row, reinterpret_cast<const float*>(&zero), count);
}

void search_grids(const LlmquantColumns& task, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row += LANES)
        for (int64_t group = 0; group < ceil_div(task.columns, task.group); ++group) search_vector(task, row, group);
}

}  // namespace

namespace LLMQUANT_LEVEL {
const SolveKernels solve = {ROWS, round_columns, search_grids};
}

}  // namespace llmquant
