// The interface: what is asked for is checked here, once; kernels trust what they are given.

#include "kernels.h"

namespace llmquant::cuda {

int64_t check(const LlmquantCudaWeight& weight) {
    if (!is_size(weight.rows) || !is_size(weight.columns)) return LLMQUANT_CUDA_BAD_SIZE;
    const bool power = weight.group >= 2 * STEP && (weight.group & (weight.group - 1)) == 0;
    if (!power && weight.group < weight.columns) return LLMQUANT_CUDA_BAD_GROUP;
    if (!is_16_bits(weight.scale_kind)) return LLMQUANT_CUDA_BAD_KIND;
    const bool whole = aligned(weight.codes) && aligned(weight.scales) && aligned(weight.zeros);
    return whole ? 0 : LLMQUANT_CUDA_BAD_ALIGNMENT;
}
}  // namespace llmquant::cuda

using namespace llmquant::cuda;

int64_t llmquant_cuda_abi() { return LLMQUANT_CUDA_ABI; }

const char* llmquant_cuda_message(int64_t code) {
    switch (code) {
        case 0:
            return "no error";
        case LLMQUANT_CUDA_BAD_SIZE:
            return "a size is not positive or too large, or a slab is outside of the weight";
        case LLMQUANT_CUDA_BAD_GROUP:
            return "the group is neither a power of two from 32 on, nor all columns";
        case LLMQUANT_CUDA_BAD_KIND:
            return "these kinds of numbers are not served together";
        case LLMQUANT_CUDA_BAD_ALIGNMENT:
            return "a pointer or a stride is not a multiple of 16 bytes";
        case LLMQUANT_CUDA_BAD_PATH:
            return "this path cannot compute the product";
        case LLMQUANT_CUDA_NO_ROOM:
            return "the workspace is too small";
        case LLMQUANT_CUDA_OLD_DEVICE:
            return "the device is older than sm_80";
        default:
            return code > 0 ? device_message(code) : "an unknown error";
    }
}

int64_t llmquant_cuda_sizes(const LlmquantCudaWeight* weight, int64_t* sizes) {
    if (const int64_t error = check(*weight)) return error;
    const Layout layout = layout_of(weight->rows, weight->columns, weight->group);
    sizes[0] = words_at(layout.steps, layout.tiles, 0, 0) * int64_t{sizeof(Words)};
    sizes[1] = grid_at(layout.groups, layout.tiles, 0) * 2;
    sizes[2] = grid_at(layout.groups, layout.tiles, 0) / 2;
    return 0;
}

int64_t llmquant_cuda_pack(const LlmquantCudaWeight* weight, const uint8_t* codes, const float* scales,
                           const uint8_t* zeros, void* stream) {
    const int64_t error = check(*weight);
    return error ? error : start_pack(*weight, codes, scales, zeros, stream);
}

int64_t llmquant_cuda_unpack(const LlmquantCudaWeight* weight, uint8_t* codes, float* scales, uint8_t* zeros,
                             void* stream) {
    const int64_t error = check(*weight);
    return error ? error : start_unpack(*weight, codes, scales, zeros, stream);
}

int64_t llmquant_cuda_dequantize(const LlmquantCudaWeight* weight, int64_t first, int64_t count, int64_t kind,
                                 void* out, void* stream) {
    if (const int64_t error = check(*weight)) return error;
    if (first < 0 || first % TILE || count <= 0 || count > weight->rows - first) return LLMQUANT_CUDA_BAD_SIZE;
    if (!is_kind(kind)) return LLMQUANT_CUDA_BAD_KIND;
    if (!aligned(out)) return LLMQUANT_CUDA_BAD_ALIGNMENT;
    return start_dequantize(*weight, first, count, kind, out, stream);
}

int64_t llmquant_cuda_round_columns(const LlmquantCudaColumns* task, void* stream) {
    const bool searched = task->candidates != nullptr;
    if (!is_size(task->rows) || task->columns <= 0 || task->columns > 128 || task->stride < task->columns)
        return LLMQUANT_CUDA_BAD_SIZE;
    if (task->bits < 2 || task->bits > 8 || (searched && task->candidate_count <= 0)) return LLMQUANT_CUDA_BAD_SIZE;
    if (task->group <= 0 || (searched && task->group % 32)) return LLMQUANT_CUDA_BAD_GROUP;
    return start_round_columns(*task, stream);
}
