// What the schedules ask of a device.

#include "kernels.h"

#ifdef __CUDACC__

#include <map>
#include <mutex>

namespace llmquant::cuda {
namespace {

__global__ void do_nothing() {}

// For kernels of which so many blocks fit a multiprocessor with so much shared memory; if that is more than one,
// launched as dense. What the device does not say is none.
void count_clusters(int each, int shared_bytes, Clusters& at_once) {
    const int room = 2 * shared_bytes / (2 * each + 1);  // of a block: no more of them fit
    if (cudaFuncSetAttribute(do_nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, room)) return;
    for (int size = 1; size <= MOST_PARTS; size *= 2) {
        cudaLaunchAttribute attributes[3] = {};
        const cudaLaunchConfig_t config = config_of({size, LANES, room, false, nullptr, size, each > 1}, attributes);
        if (cudaOccupancyMaxActiveClusters(&at_once[shift_of(size)], do_nothing, &config)) at_once[shift_of(size)] = 0;
    }
    cudaGetLastError();  // which a later launch would be blamed for
}

cudaError_t describe(int index, Device* device) {
    int major = 0, minor = 0, shared_bytes = 0;
    cudaError_t error = cudaDeviceGetAttribute(&device->processors, cudaDevAttrMultiProcessorCount, index);
    if (!error) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    if (!error) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
    if (!error) error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
    device->capability = 10 * major + minor;
    for (int each = 1; each <= 2 && !error && device->capability >= 90; ++each)
        count_clusters(each, shared_bytes, device->clusters[each - 1]);
    return error;
}

}  // namespace

// A device is asked once: every product wants to know.
int64_t current_device(Device* device) {
    static std::mutex mutex;
    static std::map<int, Device> known;
    int index = 0;
    if (const cudaError_t error = cudaGetDevice(&index)) return error;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(index);
    if (found != known.end()) {
        *device = found->second;
        return 0;
    }
    const cudaError_t error = describe(index, device);
    if (!error) known[index] = *device;
    return error;
}

}  // namespace llmquant::cuda

#endif
