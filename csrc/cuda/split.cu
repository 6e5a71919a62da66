// Products on Hopper by clusters of blocks that share the columns of a tile.

#include "wgmma.h"

namespace llmquant::cuda {

const Path split = {warpgroups::schedule<warpgroups::Team::SPLIT>, [](int64_t) { return int64_t{0}; },
                    warpgroups::start<warpgroups::Team::SPLIT>};

}  // namespace llmquant::cuda
