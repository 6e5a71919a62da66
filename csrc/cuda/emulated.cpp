// What tests set and read of the emulated device; see emulated.h. It is compiled with all .cu files as C++.

#include "kernels.h"

namespace llmquant::cuda {

int64_t current_device(Device* device) {
    *device = emulated::machine().device;
    return 0;
}

}  // namespace llmquant::cuda

void llmquant_emulate(int64_t processors, int64_t in_gpc, int64_t capability, int64_t seed, int64_t late) {
    using namespace llmquant::cuda;
    emulated::Machine& machine = emulated::machine();
    machine.device = {static_cast<int>(processors), static_cast<int>(capability), {}};
    for (int64_t left = processors; left > 0; left -= in_gpc)
        for (int each = 1; each <= 2; ++each)
            for (int size = 1; size <= MOST_PARTS; size *= 2)
                machine.device.clusters[each - 1][shift_of(size)] += static_cast<int>(each * min(left, in_gpc) / size);
    machine.seed = static_cast<uint32_t>(seed);
    machine.late = late != 0;
}

int64_t llmquant_emulated_conflicts() { return std::exchange(llmquant::cuda::emulated::machine().worst_conflict, 0); }

int64_t llmquant_emulated_schedule(int64_t tiles, int64_t chunks, int64_t blocks, int32_t* done) {
    using namespace llmquant::cuda;
    const Schedule schedule = schedule_of(tiles, chunks, blocks, chunks % 7);
    if (schedule.blocks > blocks) return 5;
    std::vector<int> shared(static_cast<std::size_t>(SLOTS * schedule.blocks), 0);
    for (int block = 0; block < schedule.blocks; ++block) {
        if (units_of(schedule, block) == 0) return 5;
        for (int unit = 0; unit < units_of(schedule, block);) {
            const Segment segment = segment_at(schedule, block, unit);
            for (int chunk = segment.begin; chunk < segment.end; ++chunk) {
                const Segment here = segment_at(schedule, block, unit++);
                if (here.tile != segment.tile || here.begin != chunk || here.end != segment.end) return 1;
                ++done[segment.tile * schedule.chunks + chunk];
            }
            if (segment.tile < schedule.whole) {
                if (!is_whole(schedule, segment)) return 2;
                continue;
            }
            const int first = first_block(schedule, segment.tile), last = last_block(schedule, segment.tile);
            if (block < first || block > last || is_whole(schedule, segment) != (first == last)) return 2;
            // Who adds up the tile looks for these sums where this block leaves them.
            if (slot_of(block, segment.begin == 0) != slot_of(block, block == first)) return 3;
            if (first != last && shared[static_cast<std::size_t>(slot_of(block, segment.begin == 0))]++) return 4;
        }
    }
    return 0;
}
