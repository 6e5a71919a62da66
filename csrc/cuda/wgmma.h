// Products on Hopper (sm_90a): weights go through registers to the tensor cores of a warpgroup, and activations there
// from shared memory, where the copy engine puts both.
//
// A block computes a tile of 256 rows and 8 to 128 tokens, or of 128 rows and 256 tokens, one chunk of 128 columns
// after the other. Four warps do nothing but ask for chunks, as many ahead as shared memory holds. The other eight are
// two warpgroups. An instruction multiplies 64 rows, 16 of each warp, and which 16 is free to choose: here those of a
// word of the codes, which is matrix A as it lies in memory. Warp w of each has tile w of 64 rows; the first warpgroup
// has words 0 and 1 of every lane, the second 2 and 3. (With 128 rows, each warpgroup has a tile, and warp w word w.)
//
// While the tensor cores multiply one step, a warp makes numbers of the codes of the next.
//
// How blocks work together, and how a tile ends, is in teams.h. The ways, wgmma.cu, pairs.cu, boxes.cu and split.cu,
// are compiled at the same time.
#pragma once

#include "path.h"
#include "teams.h"
#include "warpgroups.h"

namespace llmquant::cuda::warpgroups {

constexpr int RESTART = 12;  // what a second tile costs a block, in chunks: measured 10 to 17
constexpr int LEAST = 2;     // chunks of a block of a split
constexpr int MOST_TOKENS = 256;

struct Task {
    Product product;
    BoxMap x;
    int token_tiles;
    BoxMap y;  // where results leave in boxes
};

// ---- the warps that ask

// Each asks for one tile of the weight, and two of them for half of the activations each: one warp would need longer to
// ask for a chunk than it takes to come.
template <int TOKENS, bool ZEROS, Team TEAM>
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
        if constexpr (TEAM == Team::PAIR) {
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
        const int units = own_units<TEAM>(schedule), ahead = min(STAGES<TOKENS>, units);
#pragma unroll 1
        for (int unit = 0; unit < ahead; ++unit) {
            const Segment segment = own_segment<TEAM>(schedule, unit);
            if (lane == 0)
                ask_for_weight(unit, segment.tile / task.token_tiles * SIDES<TEAM> + side<TEAM>(), segment.begin);
        }
        prefetch_map(task.x);
        if (TEAM == Team::PAIR) await_cluster();
        if (task.product.overlap) await_previous();  // x may come from it; the weight does not
        Place<TOKENS> place;
#pragma unroll 1
        for (int done = 0; done < units;) {
            const Segment segment = own_segment<TEAM>(schedule, done);
            const int row_tile = segment.tile / task.token_tiles * SIDES<TEAM> + side<TEAM>();
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

// Of the arrivals that say that a stage is free, one.
template <Team TEAM, int TOKENS>
__device__ __forceinline__ void release(Shared<TOKENS>& shared, int stage) {
    arrive(&shared.empty[stage]);
    if (TEAM == Team::PAIR) arrive_at(&shared.empty[stage], side<TEAM>() ^ 1);
}

// Of a stage that results leave from, all of the warpgroup: by the thread that has asked for that.
template <Team TEAM, int TOKENS>
__device__ __forceinline__ void release_left(Shared<TOKENS>& shared, int stage) {
    if (thread_index() % WARPGROUP) return;
    await_left();
#pragma unroll 1
    for (int i = 0; i < WARPGROUP / LANES * RELEASING; ++i) release<TEAM>(shared, stage);
}

// So many chunks; `shift` is the layout's, and GROUP_STEPS steps or more share scales. If results are `leaving` from
// the stage before the first, that is free when a chunk has been multiplied. The last stage is for the caller to
// release.
template <class T, bool ZEROS, int TOKENS, int GROUP_STEPS, Team TEAM>
__device__ __forceinline__ void multiply(Shared<TOKENS>& shared, int shift, int chunks, bool leaving,
                                         Place<TOKENS>& place, Sums<TOKENS>& sums) {
    const Part<TOKENS> part;
    Scaling<T, ZEROS> scaling[OWN<TOKENS>];
    int before = place.before();  // the stage
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const Stage<TOKENS>& stage = shared.stages[place.stage];
        await_phase(&shared.full[place.stage], place.parity);
        const uint64_t x = matrix_of(stage.x);
        Numbers<TOKENS> a[DEPTH];
        auto codes = codes_of(stage, part, 0);
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            if (step % GROUP_STEPS == 0) {
                const auto scales = scales_of(stage, part, step >> shift);
                const uint32_t zeros = zeros_of<ZEROS>(stage, part, step >> shift);
#pragma unroll
                for (int j = 0; j < OWN<TOKENS>; ++j) scaling[j].set(scales.word[j], zeros, j);
            }
            const auto next = step + 1 < STEPS ? codes_of(stage, part, step + 1) : codes;
#pragma unroll
            for (int j = 0; j < OWN<TOKENS>; ++j) scaling[j].apply(codes.word[j], a[step % DEPTH][j]);
            codes = next;
            begin_group();
#pragma unroll
            for (int j = 0; j < OWN<TOKENS>; ++j)
                multiply_add_group<T, TOKENS>(sums[j], a[step % DEPTH][j], x_of<TOKENS>(x, step));
            commit_group();
            await_groups<DEPTH - 1>();  // whose numbers make room for the next
            if (step == DEPTH - 2) {
                sync_warp();  // all lanes have read that stage; in a branch, ptxas would serialize wgmma
                if (chunk > 0 && part.lane < RELEASING) release<TEAM>(shared, before);
            }
            if (step == STEPS - 1 && leaving && chunk == 0) release_left<TEAM>(shared, before);
        }
        before = place.stage;
        place.advance();
    }
    await_sums(sums);
}

template <class T, bool ZEROS, int TOKENS, int GROUP_STEPS, Team TEAM, bool BOXED>
__device__ __forceinline__ void consume(const Task& task, Shared<TOKENS>& shared) {
    const Product& product = task.product;
    Place<TOKENS> place;
    constexpr float WORTH = Scaling<T, ZEROS>::WORTH;
    bool leaving = false;
    const auto sum_up = [&](int chunks, Sums<TOKENS>& sums) {
        multiply<T, ZEROS, TOKENS, GROUP_STEPS, TEAM>(shared, product.weight.layout.shift, chunks, leaving, place,
                                                      sums);
    };
    const auto release_last = [&] {
        sync_warp();
        if (thread_index() % LANES < RELEASING) release<TEAM>(shared, place.before());
    };
    if constexpr (TEAM == Team::SPLIT) {  // without a loop around it, the inner one has fifty instructions less
        Sums<TOKENS> sums = {};
        sum_up(own_units<TEAM>(product.schedule), sums);
        release_last();
        finish_split<T, TOKENS>(product, task.token_tiles, shared, sums, WORTH);
    } else {
        for (int done = 0; done < own_units<TEAM>(product.schedule);) {
            const Segment segment = own_segment<TEAM>(product.schedule, done);
            Sums<TOKENS> sums = {};
            sum_up(segment.end - segment.begin, sums);
            if constexpr (!BOXED) release_last();
            if constexpr (WORTH != 1)
#pragma unroll
                for (int j = 0; j < OWN<TOKENS>; ++j)
#pragma unroll
                    for (int i = 0; i < TOKENS / 2; ++i) sums[j][i] *= WORTH;
            const bool mine =
                is_whole(product.schedule, segment) || add_blocks<TOKENS, TEAM>(product, segment, shared, sums);
            const int row_tile = segment.tile / task.token_tiles * SIDES<TEAM> + side<TEAM>();
            const int token_tile = segment.tile % task.token_tiles;
            if constexpr (BOXED) {
                leaving = mine;
                if (mine)
                    leave<T, TOKENS>(product, task.y, row_tile, token_tile, shared.stages[place.before()], sums);
                else
                    release_last();
            } else if (mine) {
                write<T, TOKENS>(product, row_tile, token_tile, sums);
            }
            done += segment.end - segment.begin;
        }
        if (BOXED) await_left();  // the block's memory goes with it
    }
}

// Of each thread that multiplies, and of those that ask.
template <int TOKENS>
constexpr int MANY = BLOCKS<TOKENS> == 1 ? 232 : 104;
template <int TOKENS>
constexpr int FEW = BLOCKS<TOKENS> == 1 ? 40 : 24;

template <class T, bool ZEROS, int TOKENS, int GROUP_STEPS, Team TEAM, bool BOXED>
__global__ void __launch_bounds__(THREADS, BLOCKS<TOKENS>) multiply_groups(const __grid_constant__ Task task) {
#ifdef LLMQUANT_WGMMA
    let_next_begin();
    Shared<TOKENS>& shared = *reinterpret_cast<Shared<TOKENS>*>(shared_memory());
    if (thread_index() == 0) {
        for (int i = 0; i < STAGES<TOKENS>; ++i) {
            begin_barrier(&shared.full[i], 4);
            begin_barrier(&shared.empty[i], CONSUMERS / LANES * RELEASING * SIDES<TEAM>);
        }
        if (TEAM == Team::SPLIT) begin_barrier(&shared.sent, 1);
        fence_barriers();
        if (TEAM == Team::SPLIT) expect_bytes(&shared.sent, FOURS<TOKENS> * CONSUMERS * int{sizeof(Floats)});
    }
    sync_block();
    if (TEAM == Team::PAIR) arrive_in_cluster();  // my barriers are there
    if (thread_index() < CONSUMERS) {
        take_registers<MANY<TOKENS>>();
        if (TEAM == Team::PAIR) await_cluster();
        consume<T, ZEROS, TOKENS, GROUP_STEPS, TEAM, BOXED>(task, shared);
    } else {
        leave_registers<FEW<TOKENS>>();
        Source<TOKENS, ZEROS, TEAM>{task, shared, thread_index() / LANES % 4, thread_index() % LANES}.run();
        if (TEAM == Team::SPLIT) meet_cluster();
    }
    if (TEAM == Team::PAIR) meet_cluster();  // the other one may still copy to here, and arrive here
#else
    trap();  // compiled for another device than the only one that this runs on
#endif
}

template <class T, bool ZEROS, int TOKENS, Team TEAM, bool BOXED>
auto kernel_of(int shift) -> void (*)(Task) {
    return shift > 2    ? multiply_groups<T, ZEROS, TOKENS, STEPS, TEAM, BOXED>
           : shift == 2 ? multiply_groups<T, ZEROS, TOKENS, 4, TEAM, BOXED>
                        : multiply_groups<T, ZEROS, TOKENS, 2, TEAM, BOXED>;
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
    if (tokens <= 1024 && rounded_up(tokens, MOST_TOKENS) != rounded_up(tokens, 128)) return with(Tokens<128>());
    return with(Tokens<MOST_TOKENS>());
}

inline int64_t tiles_of_tokens(int64_t tokens) {
    return choose_tokens(tokens, [&](auto tile) { return rounded_up(tokens, tile.COUNT) / tile.COUNT; });
}

template <Team TEAM>
Schedule schedule(const Layout& layout, int64_t tokens, const Device& device) {
    return choose_tokens(tokens, [&](auto tile) {
        constexpr int TOKENS = decltype(tile)::COUNT, ROW_TILES = TILES<TOKENS> * SIDES<TEAM>;
        const int64_t tiles = rounded_up(layout.tiles, ROW_TILES) / ROW_TILES * tiles_of_tokens(tokens);
        const int64_t chunks = layout.steps / STEPS;
        if (TEAM == Team::SPLIT) return cluster_schedule_of(tiles, chunks, device.clusters[BLOCKS<TOKENS> - 1], LEAST);
        const int64_t workers = max(int64_t{1}, int64_t{BLOCKS<TOKENS>} * device.processors / SIDES<TEAM>);
        return schedule_of(tiles, chunks, workers, RESTART);
    });
}

inline int64_t tile_bytes(int64_t tokens) {
    return choose_tokens(tokens, [](auto tile) {
        constexpr int TOKENS = decltype(tile)::COUNT;
        return int64_t{TILES<TOKENS> * TILE} * TOKENS * int64_t{sizeof(float)};
    });
}

template <Team TEAM, int TOKENS, bool BOXED>
int64_t start_tiles(const Product& product, int64_t kind, void* stream) {
    const Layout& layout = product.weight.layout;
    const bool fp16 = kind == LLMQUANT_CUDA_FP16;
    void (*const kernel)(Task) = product.weight.zeros ? fp16 ? kernel_of<Fp16, true, TOKENS, TEAM, BOXED>(layout.shift)
                                                             : kernel_of<Bf16, true, TOKENS, TEAM, BOXED>(layout.shift)
                                 : fp16               ? kernel_of<Fp16, false, TOKENS, TEAM, BOXED>(layout.shift)
                                                      : kernel_of<Bf16, false, TOKENS, TEAM, BOXED>(layout.shift);
    Task task = {product, {}, static_cast<int>(tiles_of_tokens(product.tokens)), {}};
    const Boxes x = {product.x, layout.columns, product.tokens, product.x_stride, BOX, TOKENS / SIDES<TEAM>, fp16};
    if (const int64_t error = map_boxes(x, &task.x)) return error;
    if constexpr (BOXED) {
        const Boxes y = {product.y, layout.rows, product.tokens, layout.rows, BOX, TOKENS, fp16};
        if (const int64_t error = map_boxes(y, &task.y)) return error;
    }
    const int cluster = TEAM == Team::SPLIT ? cluster_of(product.schedule) : TEAM == Team::PAIR ? 2 : 0;
    return launch(kernel,
                  {int64_t{product.schedule.blocks} * SIDES<TEAM>, THREADS, sizeof(Shared<TOKENS>), product.overlap,
                   stream, cluster, TEAM == Team::SPLIT && BLOCKS<TOKENS> > 1},
                  task);
}

template <Team TEAM>
int64_t start(const Product& product, int64_t kind, void* stream) {
    return choose_tokens(product.tokens, [&](auto tile) -> int64_t {
        constexpr int TOKENS = decltype(tile)::COUNT;
        if constexpr (TEAM == Team::PAIR && TOKENS <= MOST_SINGLE_TOKENS)
            return LLMQUANT_CUDA_BAD_PATH;
        else
            return start_tiles<TEAM, TOKENS, false>(product, kind, stream);
    });
}

// Results leave in boxes from the largest tiles, and where rows of y are aligned as the copy engine wants them.
template <Team TEAM>
int64_t start_boxed(const Product& product, int64_t kind, void* stream) {
    return choose_tokens(product.tokens, [&](auto tile) -> int64_t {
        if constexpr (decltype(tile)::COUNT == MOST_TOKENS)
            if (product.weight.layout.rows % GRANULE == 0)
                return start_tiles<TEAM, MOST_TOKENS, true>(product, kind, stream);
        return pairs.start(product, kind, stream);
    });
}

}  // namespace llmquant::cuda::warpgroups
