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
        case LLMQUANT_CUDA_BOXES:
            return boxes;
        case LLMQUANT_CUDA_SPLIT:
            return split;
        default:
            return gemm;
    }
}

// Of a product: by which path, and how its work is shared.
struct Way {
    int64_t path;
    Schedule schedule;
};

Way choose(const Layout& layout, int64_t tokens, const Device& device) {
    for (const Choice& choice : CHOICES) {
        if (device.capability < choice.from || device.capability > choice.to || tokens > choice.tokens) continue;
        const Schedule schedule = path_of(choice.path).schedule(layout, tokens, device);
        if (!schedule.blocks || (choice.at_once && schedule.tiles > schedule.blocks)) continue;
        if (choice.in_clusters) {
            const Schedule other = path_of(choice.in_clusters).schedule(layout, tokens, device);
            if (cluster_of(other) > 1 && longest(other) <= longest(schedule) + choice.longer)
                return {choice.in_clusters, other};
        }
        return {choice.path, schedule};
    }
    return {LLMQUANT_CUDA_DEQUANTIZE, {}};
}

int64_t check_path(const LlmquantCudaLinear& task, const Device& device) {
    if (task.path < LLMQUANT_CUDA_AUTO || task.path > LLMQUANT_CUDA_DEQUANTIZE) return LLMQUANT_CUDA_BAD_PATH;
    const bool clusters = task.path == LLMQUANT_CUDA_CLUSTER;
    const bool hopper = task.path >= LLMQUANT_CUDA_WGMMA && task.path <= LLMQUANT_CUDA_SPLIT;
    const bool wrong =
        (task.path == LLMQUANT_CUDA_GEMV && task.tokens > MOST_GEMV_TOKENS) ||
        (clusters && (task.tokens > MOST_GEMV_TOKENS || device.capability < 90)) ||
        ((task.path == LLMQUANT_CUDA_PAIRS || task.path == LLMQUANT_CUDA_BOXES) && task.tokens <= MOST_SINGLE_TOKENS) ||
        (hopper && device.capability != 90);
    return wrong ? LLMQUANT_CUDA_BAD_PATH : 0;
}

// A product, checked, and how it is computed.
struct Plan {
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
    Device device = {};
    if (const int64_t error = find_device(&device)) return error;
    if (const int64_t error = check_path(task, device)) return error;

    Product& product = plan->product;
    product.weight = weight_of(task.weight);
    const Layout& layout = product.weight.layout;
    Way way = {task.path, {}};
    if (task.path == LLMQUANT_CUDA_AUTO)
        way = choose(layout, task.tokens, device);
    else if (task.path != LLMQUANT_CUDA_DEQUANTIZE)
        way.schedule = path_of(task.path).schedule(layout, task.tokens, device);
    plan->path = way.path;
    if (plan->path == LLMQUANT_CUDA_DEQUANTIZE) return 0;
    if (!way.schedule.blocks) return LLMQUANT_CUDA_BAD_SIZE;

    product.x = static_cast<const uint16_t*>(task.x);
    product.bias = task.bias;
    product.y = static_cast<uint16_t*>(task.y);
    product.partials = static_cast<Floats*>(task.partials);
    product.tickets = task.tickets;
    product.x_stride = task.x_stride;
    product.tokens = static_cast<int>(task.tokens);
    product.bias_kind = static_cast<int>(task.bias_kind);
    product.overlap = device.capability >= 90 && task.overlap;
    product.schedule = way.schedule;
    const Path& path = path_of(plan->path);
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
