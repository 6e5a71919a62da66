// What tests set and read of the emulated device; see emulated.h. It is compiled with all .cu files as C++.

#include "device.h"

void llmquant_emulate(int64_t processors, int64_t capability, int64_t seed, int64_t late) {
    llmquant::cuda::emulated::Machine& machine = llmquant::cuda::emulated::machine();
    machine.device = {static_cast<int>(processors), static_cast<int>(capability)};
    machine.seed = static_cast<uint32_t>(seed);
    machine.late = late != 0;
}

int64_t llmquant_emulated_conflicts() { return std::exchange(llmquant::cuda::emulated::machine().worst_conflict, 0); }
