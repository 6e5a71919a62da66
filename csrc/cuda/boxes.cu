// Products on Hopper by pairs of blocks, whose results leave through shared memory while the next tile begins.

#include "wgmma.h"

namespace llmquant::cuda {

const Path boxes = {warpgroups::schedule<warpgroups::Team::PAIR>, warpgroups::tile_bytes,
                    warpgroups::start_boxed<warpgroups::Team::PAIR>, true};

}  // namespace llmquant::cuda
