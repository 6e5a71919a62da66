// Products on Hopper (sm_90a): weights go through registers to the tensor cores of a warpgroup, and activations there
// from shared memory, where the copy engine puts both.
//
// A block computes a tile of 256 rows and 8 to 128 tokens, or of 128 rows and 256 tokens, one chunk of 128 columns
// after the other. Four warps do nothing but ask for chunks, as many ahead as shared memory holds. The other eight are
// two warpgroups. An instruction multiplies 64 rows, 16 of each warp, and which 16 is free to choose: here those of a
// word of the codes, which is matrix A as it lies in memory. Warp w of each has tile w of 64 rows; the first warpgroup
// has words 0 and 1 of every lane, the second 2 and 3. (With 128 rows, warp w has tile w % 2 and word w / 2 of these
// two.)
//
// While the tensor cores multiply one step, a warp makes numbers of the codes of the next, in one of the two ways of
// warpgroups.h.
//
// Two blocks may be a pair, a cluster of tiles that are below one another: each then asks for half of the activations,
// for both. So these are read half as often from L2, which for many tokens is most of what is read from there.

#include <type_traits>

#include "finish.h"
#include "path.h"
#include "warpgroups.h"

namespace llmquant::cuda {
namespace {

using namespace warpgroups;

constexpr int RESTART = 4;  // what a second tile costs a block, in chunks

struct Task {
    Product product;
    BoxMap x;
    int token_tiles;
};

// ---- the warps that ask

// A block, or a pair of them, as the schedule counts, and which of the pair this one is.
template <bool PAIR>
__device__ __forceinline__ int worker() {
    return PAIR ? cluster_index() : block_index();
}
template <bool PAIR>
__device__ __forceinline__ int side() {
    return PAIR ? rank_in_cluster() : 0;
}
template <bool PAIR>
constexpr int SIDES = PAIR ? 2 : 1;

// Each asks for one tile of the weight, and two of them for half of the activations each: one warp would need longer to
// ask for a chunk than it takes to come.
template <int TOKENS, bool ZEROS, bool PAIR>
struct Source {
    const Task& task;
    Shared<TOKENS>& shared;
    int warp, lane;

    // What belongs to this warp's tile of the weight, and how many bytes are to come for this warp.
    __device__ __forceinline__ void ask_for_weight(int stage, int row_tile, int chunk) const {
        const Weight& weight = task.product.weight;
        const Layout& layout = weight.layout;
        const int tile = row_tile * TILES<TOKENS> + warp, groups = max(1, STEPS >> layout.shift);
        constexpr int CODES = STEPS * LANES * int{sizeof(Words)};
        const int scales = groups * TILE * 2, zeros = ZEROS ? groups * TILE / 2 : 0;
        const bool there = warp < TILES<TOKENS> && tile < layout.tiles;
        Stage<TOKENS>& to = shared.stages[stage];
        Barrier* full = &shared.full[stage];
        expect_bytes(full, (warp < BOXES ? int{sizeof(to.x[0])} : 0) + (there ? CODES + scales + zeros : 0));
        if (!there) return;
        const uint64_t policy = task.token_tiles == 1 ? evict_first() : evict_normal();
        const int64_t grid = grid_at(layout.groups, tile, chunk * STEPS >> layout.shift) / 8;
        copy_bulk(to.codes[warp], weight.codes + words_at(layout.steps, tile, chunk * STEPS, 0), CODES, full, policy);
        copy_bulk(to.scales[warp], weight.scales + grid, scales, full, policy);
        if (ZEROS) copy_bulk(to.zeros[warp], weight.zeros + grid, zeros, full, policy);
    }

    __device__ __forceinline__ void ask_for_x(int stage, int token_tile, int chunk) const {
        if constexpr (PAIR) {
            const int first = rank_in_cluster() * (TOKENS / 2);
            if (warp < BOXES)
                copy_box_to_both(shared.stages[stage].x[warp] + first * BOX / GRANULE, task.x,
                                 chunk * COLUMNS + warp * BOX, token_tile * TOKENS + first, &shared.full[stage]);
        } else if (warp < BOXES) {
            copy_box(shared.stages[stage].x[warp], task.x, chunk * COLUMNS + warp * BOX, token_tile * TOKENS,
                     &shared.full[stage]);
        }
    }

    // Every chunk of this block, in order.
    __device__ void run() const {
        const Schedule& schedule = task.product.schedule;
        const int units = units_of(schedule, worker<PAIR>()), ahead = min(STAGES<TOKENS>, units);
#pragma unroll 1
        for (int unit = 0; unit < ahead; ++unit) {
            const Segment segment = segment_at(schedule, worker<PAIR>(), unit);
            if (lane == 0)
                ask_for_weight(unit, segment.tile / task.token_tiles * SIDES<PAIR> + side<PAIR>(), segment.begin);
        }
        prefetch_map(task.x);
        if (PAIR) await_cluster();
        if (task.product.overlap) await_previous();  // x may come from it; the weight does not
        Place<TOKENS> place;
#pragma unroll 1
        for (int done = 0; done < units;) {
            const Segment segment = segment_at(schedule, worker<PAIR>(), done);
            const int row_tile = segment.tile / task.token_tiles * SIDES<PAIR> + side<PAIR>();
            const int token_tile = segment.tile % task.token_tiles;
#pragma unroll 1
            for (int chunk = segment.begin; chunk < segment.end; ++chunk, ++done) {
                if (done >= ahead) {
                    await_phase(&shared.empty[place.stage], place.parity ^ 1);
                    if (lane == 0) ask_for_weight(place.stage, row_tile, chunk);
                }
                if (lane == 0) ask_for_x(place.stage, token_tile, chunk);
                place.advance();
            }
        }
    }
};

// ---- the warps that multiply

template <class T, int TOKENS, bool PAIR, class Multiplier>
__device__ __forceinline__ void multiply(Shared<TOKENS>& shared, const Part<TOKENS>& part, int shift, int chunks,
                                         Place<TOKENS>& place, Sums<TOKENS>& sums) {
    const auto release = [&](int stage) {
        if (part.lane == 0) arrive(&shared.empty[stage]);
        if (PAIR && part.lane == 0) arrive_at(&shared.empty[stage], side<PAIR>() ^ 1);
    };
    Multiplier multiplier;
    int before = 0;  // the stage
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const Stage<TOKENS>& stage = shared.stages[place.stage];
        await_phase(&shared.full[place.stage], place.parity);
        const uint64_t x = matrix_of(stage.x);
        Numbers<TOKENS> a[DEPTH];
        auto codes = codes_of(stage, part, 0);
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            multiplier.begin_step(stage, part, shift, step);
            const auto next = step + 1 < STEPS ? codes_of(stage, part, step + 1) : codes;
#pragma unroll
            for (int j = 0; j < OWN<TOKENS>; ++j) multiplier.to_numbers(codes.word[j], j, a[step % DEPTH][j]);
            codes = next;
            begin_group();
            multiplier.multiply(a[step % DEPTH], x_of<TOKENS>(x, step), step, sums);
            commit_group();
            multiplier.end_step(stage, part, step, sums);
            if (!Multiplier::DRAINS && step == DEPTH - 2 && chunk > 0) release(before);
        }
        if (Multiplier::DRAINS) {
            sync_warp();  // all lanes have read its scales
            release(place.stage);
        }
        before = place.stage;
        place.advance();
    }
    if (!Multiplier::DRAINS) {
        await_groups<0>();
        release(before);
    }
}

// Leaves this block's sums in the workspace; the last block of the tile finds in `sums` those of all, and true.
template <int TOKENS, bool PAIR>
__device__ __forceinline__ bool add_blocks(const Product& product, const Segment& segment, Shared<TOKENS>& shared,
                                           Sums<TOKENS>& sums) {
    constexpr int FOURS = OWN<TOKENS> * TOKENS / 8;
    const Schedule& schedule = product.schedule;
    const auto slot = [&](int block, bool begins_tile) {
        const int place = slot_of(block, begins_tile) * SIDES<PAIR> + side<PAIR>();
        return product.partials + (int64_t{place} * FOURS * CONSUMERS + thread_index());
    };
    Floats* own = slot(worker<PAIR>(), segment.begin == 0);
#pragma unroll
    for (int i = 0; i < FOURS; ++i) {
        const float* four = &sums[i / (TOKENS / 8)][i % (TOKENS / 8) * 4];
        own[i * CONSUMERS] = {{four[0], four[1], four[2], four[3]}};
    }
    const auto sync = [] { sync_threads<CONSUMERS>(); };
    if (!is_last(product, segment.tile, segment.tile * SIDES<PAIR> + side<PAIR>(), &shared.word, sync)) return false;
    const int first = first_block(schedule, segment.tile), last = last_block(schedule, segment.tile);
#pragma unroll
    for (int i = 0; i < OWN<TOKENS> * TOKENS / 2; ++i) sums[i / (TOKENS / 2)][i % (TOKENS / 2)] = 0;
    [[maybe_unused]] constexpr int BLOCKS_AT_ONCE = FOURS <= 4 ? 4 : 1;  // so that many loads are on their way
#pragma unroll BLOCKS_AT_ONCE
    for (int block = first; block <= last; ++block) {
        const Floats* other = slot(block, block == first);
#pragma unroll
        for (int i = 0; i < FOURS; ++i) {
            const Floats more = load_fresh(other + i * CONSUMERS);
            float* four = &sums[i / (TOKENS / 8)][i % (TOKENS / 8) * 4];
#pragma unroll
            for (int r = 0; r < 4; ++r) four[r] += more.value[r];
        }
    }
    return true;
}

// Sums of a lane are of one row and two tokens; transposed, of one token and two rows.
template <class T, int TOKENS>
__device__ __forceinline__ void write(const Product& product, int row_tile, int token_tile, const Sums<TOKENS>& sums) {
    const Part<TOKENS> part;
    const int rows = product.weight.layout.rows, first_row = row_tile * TILES<TOKENS> * TILE;
#pragma unroll
    for (int j = 0; j < OWN<TOKENS>; ++j)
#pragma unroll
        for (int b = 0; b < 2; ++b) {
            const int of_sums = first_row + part.row(j, 2 * b);
            const float bias = of_sums < rows ? bias_at(product, of_sums) : 0;
            const int row = of_sums - part.lane / 4 + part.lane % 4 * 2;  // after they are transposed
#pragma unroll
            for (int i = 0; i < TOKENS / 8; ++i) {
                const float* two = &sums[j][4 * i + 2 * b];
                const uint32_t pair = transpose_matrix(to_pair<T>(two[0] + bias, two[1] + bias));
                const int token = token_tile * TOKENS + 8 * i + part.lane / 4;
                if (token >= product.tokens) continue;
                uint16_t* y = product.y + int64_t{token} * rows + row;
                if (row + 1 < rows && rows % 2 == 0) {
                    *reinterpret_cast<uint32_t*>(y) = pair;
                } else {
                    if (row < rows) y[0] = static_cast<uint16_t>(pair);
                    if (row + 1 < rows) y[1] = static_cast<uint16_t>(pair >> 16);
                }
            }
        }
}

template <class T, int TOKENS, bool PAIR, class Multiplier>
__device__ __forceinline__ void consume(const Task& task, Shared<TOKENS>& shared) {
    const Product& product = task.product;
    Place<TOKENS> place;
    for (int done = 0; done < units_of(product.schedule, worker<PAIR>());) {
        const Segment segment = segment_at(product.schedule, worker<PAIR>(), done);
        Sums<TOKENS> sums = {};
        multiply<T, TOKENS, PAIR, Multiplier>(shared, Part<TOKENS>(), product.weight.layout.shift,
                                              segment.end - segment.begin, place, sums);
        if (is_whole(product.schedule, segment) || add_blocks<TOKENS, PAIR>(product, segment, shared, sums))
            write<T, TOKENS>(product, segment.tile / task.token_tiles * SIDES<PAIR> + side<PAIR>(),
                             segment.tile % task.token_tiles, sums);
        done += segment.end - segment.begin;
    }
}

// Of each thread that multiplies, and of those that ask.
template <int TOKENS>
constexpr int MANY = BLOCKS<TOKENS> == 1 ? 232 : 104;
template <int TOKENS>
constexpr int FEW = BLOCKS<TOKENS> == 1 ? 40 : 24;

// GROUP_STEPS: those of a chunk that share scales, if these are for sums; else 0.
template <class T, bool ZEROS, int TOKENS, int GROUP_STEPS, bool PAIR>
__global__ void __launch_bounds__(THREADS, BLOCKS<TOKENS>) multiply_groups(const __grid_constant__ Task task) {
#ifdef LLMQUANT_WGMMA
    using Multiplier = std::conditional_t<GROUP_STEPS != 0, Raw<T, ZEROS, TOKENS, GROUP_STEPS ? GROUP_STEPS : 1>,
                                          Scaled<T, ZEROS, TOKENS>>;
    let_next_begin();
    Shared<TOKENS>& shared = *reinterpret_cast<Shared<TOKENS>*>(shared_memory());
    if (thread_index() == 0) {
        for (int i = 0; i < STAGES<TOKENS>; ++i) {
            begin_barrier(&shared.full[i], 4);
            begin_barrier(&shared.empty[i], CONSUMERS / LANES * SIDES<PAIR>);
        }
        fence_barriers();
    }
    sync_block();
    if (PAIR) arrive_in_cluster();  // my barriers are there
    if (thread_index() < CONSUMERS) {
        take_registers<MANY<TOKENS>>();
        if (PAIR) await_cluster();
        consume<T, TOKENS, PAIR, Multiplier>(task, shared);
    } else {
        leave_registers<FEW<TOKENS>>();
        Source<TOKENS, ZEROS, PAIR>{task, shared, thread_index() / LANES % 4, thread_index() % LANES}.run();
    }
    if (PAIR) {  // the other one may still copy to here, and arrive here
        sync_warp();
        arrive_in_cluster();
        await_cluster();
    }
#else
    trap();  // compiled for another device than the only one that this runs on
#endif
}

template <class T, bool ZEROS, int TOKENS>
auto kernel_of(int shift) -> void (*)(Task) {
    if constexpr (TOKENS == 8)  // for 16 and such short groups there are too few registers
        if (shift == 2) return multiply_groups<T, ZEROS, TOKENS, 4, false>;
    if constexpr (TOKENS <= 16)
        if (shift > 2) return multiply_groups<T, ZEROS, TOKENS, STEPS, false>;
    return multiply_groups<T, ZEROS, TOKENS, 0, false>;
}

template <int COUNT_>
struct Tokens {
    static constexpr int COUNT = COUNT_;
};

// `with` gets the smallest number of tokens of a tile that so many fit into, or the largest.
template <class With>
auto choose_tokens(int64_t tokens, With with) {
    if (tokens <= 8) return with(Tokens<8>());
    if (tokens <= 16) return with(Tokens<16>());
    if (tokens <= 32) return with(Tokens<32>());
    if (tokens <= 64) return with(Tokens<64>());
    if (tokens <= 1024 && rounded_up(tokens, 256) != rounded_up(tokens, 128)) return with(Tokens<128>());
    return with(Tokens<256>());
}

int64_t tiles_of_tokens(int64_t tokens) {
    return choose_tokens(tokens, [&](auto tile) { return rounded_up(tokens, tile.COUNT) / tile.COUNT; });
}

template <bool PAIR>
Schedule schedule(const Layout& layout, int64_t tokens, const Device& device) {
    return choose_tokens(tokens, [&](auto tile) {
        constexpr int TOKENS = decltype(tile)::COUNT, ROW_TILES = TILES<TOKENS> * SIDES<PAIR>;
        const int64_t tiles = rounded_up(layout.tiles, ROW_TILES) / ROW_TILES * tiles_of_tokens(tokens);
        const int64_t workers = BLOCKS<TOKENS> * device.processors / SIDES<PAIR>;
        return schedule_of(tiles, layout.steps / STEPS, max(int64_t{1}, workers), RESTART);
    });
}

int64_t tile_bytes(int64_t tokens) {
    return choose_tokens(tokens, [](auto tile) {
        constexpr int TOKENS = decltype(tile)::COUNT;
        return int64_t{TILES<TOKENS> * TILE} * TOKENS * int64_t{sizeof(float)};
    });
}

template <bool PAIR, class Kernel>
int64_t start_tiles(const Product& product, bool fp16, int tokens, int shared_bytes, Kernel kernel, void* stream) {
    Task task = {product, {}, static_cast<int>(tiles_of_tokens(product.tokens))};
    const Boxes boxes = {
        product.x, product.weight.layout.columns, product.tokens, product.x_stride, BOX, tokens / SIDES<PAIR>, fp16};
    if (const int64_t error = map_boxes(boxes, &task.x)) return error;
    const int64_t blocks = product.schedule.blocks * int64_t{SIDES<PAIR>};
    return launch(kernel, {blocks, THREADS, shared_bytes, product.overlap, stream, SIDES<PAIR>}, task);
}

int64_t start(const Product& product, int64_t kind, void* stream) {
    return choose_tokens(product.tokens, [&](auto tile) -> int64_t {
        constexpr int TOKENS = decltype(tile)::COUNT;
        const bool fp16 = kind == LLMQUANT_CUDA_FP16;
        const int shift = product.weight.layout.shift;
        void (*const kernel)(Task) =
            product.weight.zeros ? fp16 ? kernel_of<Fp16, true, TOKENS>(shift) : kernel_of<Bf16, true, TOKENS>(shift)
            : fp16               ? kernel_of<Fp16, false, TOKENS>(shift)
                                 : kernel_of<Bf16, false, TOKENS>(shift);
        return start_tiles<false>(product, fp16, TOKENS, sizeof(Shared<TOKENS>), kernel, stream);
    });
}

int64_t start_pairs(const Product& product, int64_t kind, void* stream) {
    return choose_tokens(product.tokens, [&](auto tile) -> int64_t {
        constexpr int TOKENS = decltype(tile)::COUNT;
        if constexpr (TOKENS > MOST_SINGLE_TOKENS) {
            const bool fp16 = kind == LLMQUANT_CUDA_FP16;
            void (*const kernel)(Task) = product.weight.zeros ? fp16 ? multiply_groups<Fp16, true, TOKENS, 0, true>
                                                                     : multiply_groups<Bf16, true, TOKENS, 0, true>
                                         : fp16               ? multiply_groups<Fp16, false, TOKENS, 0, true>
                                                              : multiply_groups<Bf16, false, TOKENS, 0, true>;
            return start_tiles<true>(product, fp16, TOKENS, sizeof(Shared<TOKENS>), kernel, stream);
        }
        return LLMQUANT_CUDA_BAD_PATH;
    });
}

}  // namespace

const Path wgmma = {schedule<false>, tile_bytes, start};
const Path pairs = {schedule<true>, tile_bytes, start_pairs, true};

}  // namespace llmquant::cuda
