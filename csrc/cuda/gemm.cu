// Products of more tokens than gemv.cu takes: on the tensor cores, from a pipeline of four stages in shared memory.
//
// A block computes a tile of 128 rows and 16, 32, 64 or 128 tokens, one chunk of columns after the other. Copies of the
// next three chunks are on their way while it does. Its 8 warps share rows and tokens, and where these are few, the
// columns of the chunk as well: 32 to a warp, so that a warp never meets two groups in a chunk. Weights get their
// scale as they leave the registers for the tensor cores, rounded once.

#include "finish.h"

namespace llmquant::cuda {
namespace {

constexpr int WARPS = 8, THREADS = WARPS * LANES;
constexpr int ROW_WARPS = 2, ROWS = ROW_WARPS * TILE;
constexpr int STAGES = 4;
constexpr int WARP_STEPS = 2;  // of a chunk, to a warp
constexpr int RESTART = 4;     // what a second tile costs a block, in chunks

static_assert(ROWS == PAD_ROWS, "tiles are whole");

// How the warps of a block share a tile of so many tokens.
template <int TOKENS_>
struct Tiling {
    static constexpr int TOKENS = TOKENS_;
    static constexpr int TOKEN_WARPS = TOKENS <= 32 ? 1 : 2;
    static constexpr int COLUMN_WARPS = WARPS / ROW_WARPS / TOKEN_WARPS;
    static constexpr int BLOCKS = TOKENS <= 64 ? 2 : 1;  // that fit a multiprocessor

    static constexpr int WARP_TOKENS = TOKENS / TOKEN_WARPS;
    static constexpr int OCTETS = WARP_TOKENS / 8;           // of tokens: one mma each
    static constexpr int STEPS = WARP_STEPS * COLUMN_WARPS;  // of a chunk
    static constexpr int COLUMNS = STEPS * STEP;
    static constexpr int GRANULES = COLUMNS / GRANULE;
    static constexpr int GROUPS = COLUMNS / 32;                               // at most, in a chunk
    static constexpr int SUMS = WORDS * OCTETS;                               // of a lane, in fours
    static constexpr int TILE_SUMS = ROW_WARPS * TOKEN_WARPS * SUMS * LANES;  // of a tile, in fours
    static_assert(PAD_COLUMNS % COLUMNS == 0, "chunks are whole");
};

template <class Tile>
struct Stage {
    Words x[Tile::TOKENS * Tile::GRANULES];
    Words codes[ROW_WARPS][Tile::STEPS * LANES];
    Words scales[ROW_WARPS][Tile::GROUPS][8];
    uint32_t zeros[ROW_WARPS][Tile::GROUPS][8];
};

constexpr int STRIDE =
    ROWS + GRANULE;  // of a token's results in shared memory: so that tokens begin in different banks

template <class Tile>
struct Shared {
    union {
        Stage<Tile> stages[STAGES];
        Floats sums[Tile::COLUMN_WARPS - 1][Tile::TILE_SUMS];  // of the warps after the first that share columns
        alignas(16) uint16_t results[Tile::TOKENS * STRIDE];
    };
    int word;
};

// Where a thread works: its warp's part of the tile.
template <class Tile>
struct Part {
    int lane, row_warp, token_warp, column_warp;

    __device__ Part() : Part(thread_index()) {}
    __device__ explicit Part(int thread)
        : lane(thread % LANES),
          row_warp(thread / LANES % ROW_WARPS),
          token_warp(thread / LANES / ROW_WARPS % Tile::TOKEN_WARPS),
          column_warp(thread / LANES / ROW_WARPS / Tile::TOKEN_WARPS) {}

    // The first four of this lane's sums among those of the tile; the next four stand LANES further on.
    __device__ int sums_at() const { return (token_warp * ROW_WARPS + row_warp) * Tile::SUMS * LANES + lane; }
};

// Copies of one chunk, in two halves: what belongs to the weight, and activations.
template <class Tile, bool ZEROS>
struct Source {
    const Product& product;
    int row_tile, token_tile;

    __device__ void stage_weight(Stage<Tile>& to, int chunk) const {
        const Layout& layout = product.weight.layout;
        constexpr int COUNT = ROW_WARPS * Tile::STEPS * LANES;
        const uint64_t policy = product.tokens <= Tile::TOKENS ? evict_first() : evict_normal();
#pragma unroll 1
        for (unsigned i = thread_index(); i < COUNT; i += THREADS) {
            const int half = i / (Tile::STEPS * LANES), at = i % (Tile::STEPS * LANES);
            const int64_t from = words_at(layout.steps, row_tile * ROW_WARPS + half, chunk * Tile::STEPS, at);
            copy_async_once(&to.codes[half][at], product.weight.codes + from, policy);
        }
        const int first = chunk * Tile::STEPS >> layout.shift;
        const int groups = max(1, Tile::STEPS >> layout.shift);
        const int thread = thread_index(), half = thread / (Tile::GROUPS * 8) % ROW_WARPS;
        const int at = thread % (Tile::GROUPS * 8);
        const int64_t grid = grid_at(layout.groups, row_tile * ROW_WARPS + half, first) / 8;
        if (thread < ROW_WARPS * Tile::GROUPS * 8 && at < groups * 8)
            copy_async(&to.scales[half][0][0] + at, product.weight.scales + grid + at, 16);
        if (ZEROS && thread < ROW_WARPS * Tile::GROUPS * 8 && at < groups * 2)
            copy_async(&to.zeros[half][0][4 * at], product.weight.zeros + grid + 4 * at, 16);
    }

    __device__ void stage_x(Stage<Tile>& to, int chunk) const {
#pragma unroll 1
        for (unsigned i = thread_index(); i < Tile::TOKENS * Tile::GRANULES; i += THREADS) {
            const int of_tile = i / Tile::GRANULES, granule = i % Tile::GRANULES;
            const int token = token_tile * Tile::TOKENS + of_tile;
            if (token < product.tokens)  // what stands where there is none is multiplied, too, and never read
                copy_granule(product, token, chunk * Tile::COLUMNS + granule * GRANULE,
                             &to.x[activations_at(Tile::GRANULES, of_tile, granule)]);
        }
    }
};

// What a warp needs for one step of a chunk.
template <class Tile>
struct Fragment {
    Words codes;
    uint32_t x[Tile::OCTETS / 2][4];

    __device__ void load(const Stage<Tile>& stage, const Part<Tile>& part, int step) {
        const int of_chunk = part.column_warp * WARP_STEPS + step;
        codes = stage.codes[part.row_warp][of_chunk * LANES + part.lane];
#pragma unroll
        for (int i = 0; i < Tile::OCTETS / 2; ++i) {
            const int token = part.token_warp * Tile::WARP_TOKENS + 16 * i + gemm_matrix_token(part.lane);
            const int granule = 2 * of_chunk + gemm_matrix_granule(part.lane);
            load_matrices(x[i], &stage.x[activations_at(Tile::GRANULES, token, granule)]);
        }
    }
};

// What it needs for all its steps of a chunk: they are of one group.
template <class T, bool ZEROS>
struct Grid {
    Scaling<T, ZEROS> of_word[WORDS];

    template <class Tile>
    __device__ __forceinline__ void load(const Stage<Tile>& stage, const Part<Tile>& part, int shift) {
        const int group = part.column_warp * WARP_STEPS >> shift;
        const Words scales = stage.scales[part.row_warp][group][part.lane / 4];
        const uint32_t zeros = ZEROS ? stage.zeros[part.row_warp][group][part.lane / 4] : MIDPOINTS;
#pragma unroll
        for (int j = 0; j < WORDS; ++j) of_word[j].set(scales.word[j], zeros, j);
    }
};

template <class T, bool ZEROS, class Tile>
__device__ __forceinline__ void multiply(const Fragment<Tile>& fragment, const Grid<T, ZEROS>& grid,
                                         float (&sums)[WORDS][Tile::OCTETS][4]) {
#pragma unroll
    for (int j = 0; j < WORDS; ++j) {
        uint32_t a[4];
        grid.of_word[j].apply(fragment.codes.word[j], a);
#pragma unroll
        for (int i = 0; i < Tile::OCTETS; ++i)
            multiply_add<T>(sums[j][i], a, fragment.x[i / 2][i % 2 * 2], fragment.x[i / 2][i % 2 * 2 + 1]);
    }
}

// The chunks of a segment.
//
// Each thread commits one group of copies per chunk, empty ones past the last. Before chunk c is read, STAGES + c - 1
// groups are committed, and all but the last STAGES - 2 have arrived: those of chunks up to c. A stage is filled again
// one barrier after what is in it was last read.
template <class T, bool ZEROS, class Tile>
__device__ void run(const Source<Tile, ZEROS>& source, const Segment& segment, Shared<Tile>& shared,
                    float (&sums)[WORDS][Tile::OCTETS][4]) {
    const Part<Tile> part;
    const int shift = source.product.weight.layout.shift, count = segment.end - segment.begin;
    const int ahead = min(STAGES - 1, count);
#pragma unroll 1
    for (int i = 0; i < ahead; ++i) source.stage_weight(shared.stages[i], segment.begin + i);
    if (source.product.overlap) await_previous();  // x may come from it; the weight does not
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; ++i) {
        if (i < ahead) source.stage_x(shared.stages[i], segment.begin + i);
        commit_copies();  // the first group has the weights of all
    }
    await_copies<STAGES - 2>();
    sync_block();

    Fragment<Tile> fragments[2];
    fragments[0].load(shared.stages[0], part, 0);
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
        const int next = i + STAGES - 1;
        if (next < count) {
            source.stage_weight(shared.stages[next % STAGES], segment.begin + next);
            source.stage_x(shared.stages[next % STAGES], segment.begin + next);
        }
        commit_copies();
        Grid<T, ZEROS> grid;
        grid.load(shared.stages[i % STAGES], part, shift);
        fragments[1].load(shared.stages[i % STAGES], part, 1);
        multiply<T, ZEROS, Tile>(fragments[0], grid, sums);
        await_copies<STAGES - 2>();
        sync_block();
        if (i + 1 < count) fragments[0].load(shared.stages[(i + 1) % STAGES], part, 0);
        multiply<T, ZEROS, Tile>(fragments[1], grid, sums);
    }
    // The last barrier was behind every copy and every read: the stages have become room for sums.
#pragma unroll
    for (int j = 0; j < WORDS; ++j)
#pragma unroll
        for (int i = 0; i < Tile::OCTETS; ++i)
#pragma unroll
            for (int r = 0; r < 4; ++r) sums[j][i][r] *= Scaling<T, ZEROS>::WORTH;
}

template <class Tile>
using Sums = float[WORDS][Tile::OCTETS][4];

template <class Tile>
__device__ __forceinline__ Floats get(const Sums<Tile>& sums, int i) {
    const float (&four)[4] = sums[i / Tile::OCTETS][i % Tile::OCTETS];
    return {{four[0], four[1], four[2], four[3]}};
}

template <class Tile>
__device__ __forceinline__ void add(Sums<Tile>& sums, int i, const Floats& more) {
#pragma unroll
    for (int r = 0; r < 4; ++r) sums[i / Tile::OCTETS][i % Tile::OCTETS][r] += more.value[r];
}

// The first warps of those that share columns get the sums of all, in the order of the columns.
template <class Tile>
__device__ void add_columns(Shared<Tile>& shared, Sums<Tile>& sums) {
    const Part<Tile> part;
    Floats* own = &shared.sums[max(part.column_warp - 1, 0)][part.sums_at()];
    if (part.column_warp > 0)
#pragma unroll
        for (int i = 0; i < Tile::SUMS; ++i) own[i * LANES] = get<Tile>(sums, i);
    sync_block();
    if (part.column_warp == 0)
#pragma unroll 1
        for (int warp = 0; warp < Tile::COLUMN_WARPS - 1; ++warp)
#pragma unroll
            for (int i = 0; i < Tile::SUMS; ++i) add<Tile>(sums, i, own[warp * Tile::TILE_SUMS + i * LANES]);
}

// Leaves this block's sums in the workspace; the last block of the tile finds in `sums` those of all, and true.
template <class Tile>
__device__ bool add_blocks(const Product& product, const Segment& segment, Shared<Tile>& shared, Sums<Tile>& sums) {
    const Part<Tile> part;
    const Schedule& schedule = product.schedule;
    const bool sums_here = part.column_warp == 0;
    const auto slot = [&](int block, bool begins_tile) {
        return product.partials + (int64_t{slot_of(block, begins_tile)} * Tile::TILE_SUMS + part.sums_at());
    };
    Floats* own = slot(block_index(), segment.begin == 0);
    if (sums_here)
#pragma unroll
        for (int i = 0; i < Tile::SUMS; ++i) own[i * LANES] = get<Tile>(sums, i);
    if (!is_last(product, segment.tile, &shared.word)) return false;
    if (!sums_here) return true;
    const int first = first_block(schedule, segment.tile), last = last_block(schedule, segment.tile);
#pragma unroll 1
    for (int block = first; block <= last; ++block) {
        const Floats* other = slot(block, block == first);
#pragma unroll
        for (int i = 0; i < Tile::SUMS; ++i) {
            if (block == first)
#pragma unroll
                for (int r = 0; r < 4; ++r) sums[i / Tile::OCTETS][i % Tile::OCTETS][r] = 0;
            add<Tile>(sums, i, load_fresh(other + i * LANES));
        }
    }
    return true;
}

template <class T, class Tile>
__device__ void write(const Product& product, int row_tile, int token_tile, Shared<Tile>& shared,
                      const Sums<Tile>& sums) {
    const Part<Tile> part;
    const int rows = product.weight.layout.rows, first_row = row_tile * ROWS, first_token = token_tile * Tile::TOKENS;
    sync_block();  // the sums become room for results
    if (part.column_warp == 0)
#pragma unroll
        for (int j = 0; j < WORDS; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const int row = part.row_warp * TILE + 16 * j + sum_row(part.lane, r);
                const float bias = first_row + row < rows ? bias_at(product, first_row + row) : 0;
#pragma unroll
                for (int i = 0; i < Tile::OCTETS; ++i) {
                    const int token = part.token_warp * Tile::WARP_TOKENS + 8 * i + sum_token(part.lane, r);
                    shared.results[token * STRIDE + row] = static_cast<uint16_t>(to_pair<T>(sums[j][i][r] + bias, 0));
                }
            }
    sync_block();
    const int tokens = min(Tile::TOKENS, product.tokens - first_token), width = min(ROWS, rows - first_row);
    uint16_t* y = product.y + int64_t{first_token} * rows + first_row;
    if (rows % GRANULE == 0) {  // every 16 bytes of y are whole
        for (int i = thread_index(); i < tokens * (ROWS / GRANULE); i += THREADS) {
            const int token = i / (ROWS / GRANULE), row = i % (ROWS / GRANULE) * GRANULE;
            if (row < width)
                *reinterpret_cast<Words*>(y + int64_t{token} * rows + row) =
                    *reinterpret_cast<const Words*>(&shared.results[token * STRIDE + row]);
        }
        return;
    }
    for (int i = thread_index(); i < tokens * ROWS; i += THREADS) {
        const int token = i / ROWS, row = i % ROWS;
        if (row < width) y[int64_t{token} * rows + row] = shared.results[token * STRIDE + row];
    }
}

template <class T, bool ZEROS, class Tile>
__global__ void __launch_bounds__(THREADS, Tile::BLOCKS) multiply_tiles(Product product) {
    let_next_begin();
    Shared<Tile>& shared = *reinterpret_cast<Shared<Tile>*>(shared_memory());
    const int token_tiles = (product.tokens + Tile::TOKENS - 1) / Tile::TOKENS;
    for (int done = 0; done < units_of(product.schedule, block_index());) {
        const Segment segment = segment_at(product.schedule, block_index(), done);
        const int row_tile = segment.tile / token_tiles, token_tile = segment.tile - row_tile * token_tiles;
        const Source<Tile, ZEROS> source = {product, row_tile, token_tile};
        Sums<Tile> sums = {};
        run<T, ZEROS, Tile>(source, segment, shared, sums);
        add_columns<Tile>(shared, sums);
        if (is_whole(product.schedule, segment) || add_blocks<Tile>(product, segment, shared, sums))
            write<T, Tile>(product, row_tile, token_tile, shared, sums);
        sync_block();  // the results become room for stages
        done += segment.end - segment.begin;
    }
}

// `with(Tiling<..>())`: the smallest tile that so many tokens fit into, or the largest.
template <class With>
auto choose_tiling(int64_t tokens, With with) {
    if (tokens <= 16) return with(Tiling<16>());
    if (tokens <= 32) return with(Tiling<32>());
    if (tokens <= 64) return with(Tiling<64>());
    return with(Tiling<128>());
}

// As many blocks as fit the device; each has at least two chunks.
Schedule schedule(const Layout& layout, int64_t tokens, const Device& device) {
    return choose_tiling(tokens, [&](auto tiling) {
        using Tile = decltype(tiling);
        const int64_t token_tiles = (tokens + Tile::TOKENS - 1) / Tile::TOKENS;
        const int64_t tiles = layout.tiles / ROW_WARPS * token_tiles, chunks = layout.steps / Tile::STEPS;
        return schedule_of(tiles, chunks, min(int64_t{Tile::BLOCKS} * device.processors, (tiles * chunks + 1) / 2),
                           RESTART);
    });
}

int64_t tile_bytes(int64_t tokens) {
    return choose_tiling(tokens, [](auto tiling) { return decltype(tiling)::TILE_SUMS * int64_t{sizeof(Floats)}; });
}

int64_t start(const Product& product, int64_t kind, void* stream) {
    return choose_tiling(product.tokens, [&](auto tiling) {
        using Tile = decltype(tiling);
        const bool fp16 = kind == LLMQUANT_CUDA_FP16;
        void (*const kernel)(Product) = product.weight.zeros
                                            ? fp16 ? multiply_tiles<Fp16, true, Tile> : multiply_tiles<Bf16, true, Tile>
                                        : fp16 ? multiply_tiles<Fp16, false, Tile>
                                               : multiply_tiles<Bf16, false, Tile>;
        const int bytes = static_cast<int>(sizeof(Shared<Tile>));
        return launch(kernel, {product.schedule.blocks, THREADS, bytes, product.overlap, stream}, product);
    });
}

}  // namespace

const Path gemm = {schedule, tile_bytes, start};

}  // namespace llmquant::cuda
