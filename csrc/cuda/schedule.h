// How the work of one product is shared: in equal runs, whatever the shape.
//
// A unit is one chunk of columns of one tile of the output. Units stand tile after tile, and each block takes a run of
// them, so a run may end one tile and begin the next ("stream-K", Osama et al., arXiv 2301.03598). A tile that one
// block computes alone is written at once. Otherwise each of its blocks leaves its sums in a slot of its own and draws
// a ticket; who draws the last one adds up all slots, in the order of the blocks. So nobody ever waits for another,
// results do not depend on who is last, and the tickets are back at zero.
#pragma once

#include "layout.h"

namespace llmquant::cuda {

constexpr int64_t MOST_UNITS = int64_t{1} << 30;

struct Schedule {
    int tiles, chunks;
    int blocks;  // at most as many as there are units
    int share;   // units of a block; one more for the first `extra` blocks
    int extra;
};

// Of no blocks, if there are more units than can be counted in 32 bits.
constexpr Schedule schedule_of(int64_t tiles, int64_t chunks, int64_t blocks) {
    const int64_t units = tiles * chunks;
    if (tiles > MOST_UNITS || units > MOST_UNITS) return {};
    blocks = blocks < units ? blocks : units;
    return {static_cast<int>(tiles), static_cast<int>(chunks), static_cast<int>(blocks),
            static_cast<int>(units / blocks), static_cast<int>(units % blocks)};
}

LLMQUANT_BOTH constexpr int first_unit(const Schedule& schedule, int block) {
    return block * schedule.share + (block < schedule.extra ? block : schedule.extra);
}

LLMQUANT_BOTH constexpr int block_of(const Schedule& schedule, int unit) {
    const int larger = schedule.extra * (schedule.share + 1);  // units of the first blocks
    return unit < larger ? unit / (schedule.share + 1) : schedule.extra + (unit - larger) / schedule.share;
}

LLMQUANT_BOTH constexpr bool has_unit(const Schedule& schedule, int block, int unit) {
    return unit < first_unit(schedule, block + 1);
}

// What a block does of one tile: chunks [begin, end).
struct Segment {
    int tile, begin, end;
};

LLMQUANT_BOTH constexpr Segment segment_at(const Schedule& schedule, int block, int unit) {
    const int tile = unit / schedule.chunks, begin = unit - tile * schedule.chunks;
    const int end = begin + first_unit(schedule, block + 1) - unit;
    return {tile, begin, end < schedule.chunks ? end : schedule.chunks};
}

LLMQUANT_BOTH constexpr int unit_after(const Schedule& schedule, const Segment& segment) {
    return segment.tile * schedule.chunks + segment.end;
}

LLMQUANT_BOTH constexpr bool is_whole(const Schedule& schedule, const Segment& segment) {
    return segment.begin == 0 && segment.end == schedule.chunks;
}

// The blocks that share a tile.
LLMQUANT_BOTH constexpr int first_block(const Schedule& schedule, int tile) {
    return block_of(schedule, tile * schedule.chunks);
}
LLMQUANT_BOTH constexpr int last_block(const Schedule& schedule, int tile) {
    return block_of(schedule, (tile + 1) * schedule.chunks - 1);
}

// A block shares at most two tiles: the one that its run begins within, and the one that it ends within.
constexpr int SLOTS = 2;
LLMQUANT_BOTH constexpr int slot_of(int block, bool begins_tile) { return SLOTS * block + (begins_tile ? 1 : 0); }

}  // namespace llmquant::cuda
