// Products on Hopper by pairs of blocks, which share what they read of the activations.

#include "wgmma.h"

namespace llmquant::cuda {

const Path pairs = {warpgroups::schedule<warpgroups::Team::PAIR>, warpgroups::tile_bytes,
                    warpgroups::start<warpgroups::Team::PAIR>, true};

}  // namespace llmquant::cuda
