// Products on Hopper by blocks that share a tile by way of memory.

#include "wgmma.h"

namespace llmquant::cuda {

const Path wgmma = {warpgroups::schedule<warpgroups::Team::NONE>, warpgroups::tile_bytes,
                    warpgroups::start<warpgroups::Team::NONE>};

}  // namespace llmquant::cuda
