// The interface of products: what is asked for is checked, the path chosen, the work shared.

#include "kernels.h"
#include "path.h"

namespace llmquant::cuda {
namespace {

int64_t find_device(Device* device) {
    const int64_t error = current_device(device);
    if (error || device->capability >= 80) return error;
    return LLMQUANT_CUDA_OLD_DEVICE;
}

const Path& path_of(int64_t path) {
    switch (path) {
        case LLMQUANT_CUDA_GEMV:
            return gemv;
        case LLMQUANT_CUDA_CLUSTER:
            return cluster;
        case LLMQUANT_CUDA_WGMMA:
            return wgmma;
        case LLMQUANT_CUDA_PAIRS:
            return pairs;
        case LLMQUANT_CUDA_SPLIT:
            return split;
        default:
            return gemm;
    }
}

// A product, checked, and how it is computed.
struct Plan {
    Device device;
    int64_t path;
    Product product;
    int64_t partials_bytes, tickets;
};

int64_t plan_of(const LlmquantCudaLinear& task, Plan* plan) {
    if (const int64_t error = check(task.weight)) return error;
    if (!is_size(task.tokens) || task.x_stride < task.weight.columns) return LLMQUANT_CUDA_BAD_SIZE;
    if (!is_16_bits(task.kind) || task.weight.scale_kind != task.kind || (task.bias && !is_kind(task.bias_kind)))
        return LLMQUANT_CUDA_BAD_KIND;
    if (!aligned(task.x) || task.x_stride % GRANULE || !aligned(task.y) || !aligned(task.partials))
        return LLMQUANT_CUDA_BAD_ALIGNMENT;
    if (task.overlap < 0 || task.overlap > 2) return LLMQUANT_CUDA_BAD_SIZE;
    if (task.path < LLMQUANT_CUDA_AUTO || task.path > LLMQUANT_CUDA_DEQUANTIZE) return LLMQUANT_CUDA_BAD_PATH;
    const bool clusters = task.path == LLMQUANT_CUDA_CLUSTER;
    if (task.path == LLMQUANT_CUDA_GEMV && task.tokens > MOST_GEMV_TOKENS) return LLMQUANT_CUDA_BAD_PATH;
    if (clusters && task.tokens > MOST_CLUSTER_TOKENS) return LLMQUANT_CUDA_BAD_PATH;
    if (const int64_t error = find_device(&plan->device)) return error;
    if (clusters && plan->device.capability < 90) return LLMQUANT_CUDA_BAD_PATH;
    if (task.path == LLMQUANT_CUDA_PAIRS && task.tokens <= MOST_SINGLE_TOKENS) return LLMQUANT_CUDA_BAD_PATH;
    const bool hopper = task.path >= LLMQUANT_CUDA_WGMMA && task.path <= LLMQUANT_CUDA_SPLIT;
    if (hopper && plan->device.capability != 90) return LLMQUANT_CUDA_BAD_PATH;
    plan->path = task.path == LLMQUANT_CUDA_AUTO
                     ? path_for(task.tokens, task.weight.rows * task.weight.columns, plan->device.capability)
                     : task.path;
    if (plan->path == LLMQUANT_CUDA_DEQUANTIZE) return 0;

    const Path& path = path_of(plan->path);
    Product& product = plan->product;
    product.weight = weight_of(task.weight);
    product.x = static_cast<const uint16_t*>(task.x);
    product.bias = task.bias;
    product.y = static_cast<uint16_t*>(task.y);
    product.partials = static_cast<Floats*>(task.partials);
    product.tickets = task.tickets;
    product.x_stride = task.x_stride;
    product.tokens = static_cast<int>(task.tokens);
    product.bias_kind = static_cast<int>(task.bias_kind);
    product.overlap = plan->device.capability >= 90 ? task.overlap : 0;
    product.schedule = path.schedule(product.weight.layout, task.tokens, plan->device);
    if (!product.schedule.blocks) return LLMQUANT_CUDA_BAD_SIZE;
    const int64_t each = path.pairs ? 2 : 1;
    plan->partials_bytes = product.schedule.blocks * each * SLOTS * path.tile_bytes(task.tokens);
    plan->tickets = plan->partials_bytes ? product.schedule.tiles * each : 0;
    return 0;
}

}  // namespace
}  // namespace llmquant::cuda

using namespace llmquant::cuda;

int64_t llmquant_cuda_path(const LlmquantCudaLinear* task) {
    Plan plan = {};
    const int64_t error = plan_of(*task, &plan);
    return error ? error : plan.path;
}

int64_t llmquant_cuda_workspace(const LlmquantCudaLinear* task, int64_t* sizes) {
    Plan plan = {};
    if (const int64_t error = plan_of(*task, &plan)) return error;
    sizes[0] = plan.partials_bytes;
    sizes[1] = plan.tickets;
    return 0;
}

int64_t llmquant_cuda_linear(const LlmquantCudaLinear* task, void* stream) {
    Plan plan = {};
    if (const int64_t error = plan_of(*task, &plan)) return error;
    if (plan.path == LLMQUANT_CUDA_DEQUANTIZE) return LLMQUANT_CUDA_BAD_PATH;
    if (task->partials_bytes < plan.partials_bytes || task->tickets_count < plan.tickets) return LLMQUANT_CUDA_NO_ROOM;
    return path_of(plan.path).start(plan.product, task->kind, stream);
}
