// torch.ops.llmquant.w4_linear on NVIDIA GPUs without Python, through torch's stable ABI: built once, it serves every
// torch from 2.10 on, and needs neither a torch with CUDA nor CUDA's headers to be built.
//
// What it recognizes as an ordinary product it gives to llmquant_cuda_linear. All else (other kinds of numbers,
// products in CUDA graphs, operands that do not fit) it hands over to llmquant/kernels/ops.py, where the rules and the
// words are.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../cuda/llmquant_cuda.h"
#include "tensors.h"

#ifndef LLMQUANT_OPERATORS  // tests have operators of their own, on the device that they emulate
#define LLMQUANT_OPERATORS "llmquant"
#define LLMQUANT_DISPATCH_KEY "CUDA"
#endif

namespace llmquant {
namespace {

static_assert(LLMQUANT_CUDA_BF16 == 0 && LLMQUANT_CUDA_FP16 == 1 && LLMQUANT_CUDA_FP32 == 2, "kind_of numbers them so");

// What torch's stable ABI of 2.10 does not have, handed over by llmquant/native.py; both return 0 or an error.
using CurrentStream = int32_t(int32_t device, void** stream);  // aoti_torch_get_current_cuda_stream
using IsCapturing = int32_t(void* stream, int32_t* status);    // cudaStreamIsCapturing; a status of 0: it is not

CurrentStream* current_stream = nullptr;
IsCapturing* is_capturing = nullptr;

struct Operands {
    const Tensor &x, &codes, &scales;
    const std::optional<Tensor>&zeros, &bias;
    int64_t rows, bits, group_size, planes;
};

// No exception passes through the stable ABI: where Python raised one, its words come as bytes.
Tensor by_python(const Operands& given) {
    using torch::stable::detail::from, torch::stable::detail::to;
    std::array<StableIValue, 9> stack = {from(given.x),     from(given.codes),      from(given.scales),
                                         from(given.zeros), from(given.bias),       from(given.rows),
                                         from(given.bits),  from(given.group_size), from(given.planes)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher(LLMQUANT_OPERATORS "::w4_linear_any", "", stack.data(), TORCH_ABI_VERSION));
    const Tensor y = to<Tensor>(stack[0]);
    if (of_bytes(y)) throw std::runtime_error(std::string(static_cast<const char*>(y.data_ptr()), y.numel()));
    return y;
}

// A part of the weight, or the bias.
bool is_flat(const Tensor& tensor, int64_t length, Device device) {
    const Device there = device_of(tensor);
    return tensor.dim() == 1 && tensor.size(0) == length && tensor.is_contiguous() && there.type == device.type &&
           there.index == device.index;
}

// Fills in the task of an ordinary product, all but its result and workspace; false: it is none. Sizes, groups, kinds
// and alignment are for llmquant_cuda_workspace to refuse; that the operands have these sizes is checked here alone.
bool describe(const Operands& given, Device device, LlmquantCudaLinear* task) {
    const auto& [x, codes, scales, zeros, bias, rows, bits, group_size, planes] = given;
    const bool known = group_size == -1 || group_size == 32 || group_size == 64 || group_size == 128;
    if (bits != 4 || !known || (planes != 1 && planes != 2) || x.dim() == 0 || !x.is_contiguous()) return false;
    const int64_t columns = x.size(x.dim() - 1);
    LlmquantCudaWeight& weight = task->weight;
    weight.rows = rows;
    weight.columns = columns;
    weight.group = group_size == -1 ? columns : group_size;
    weight.scale_kind = kind_of(scales);
    std::array<int64_t, 3> bytes = {};
    if (llmquant_cuda_sizes(&weight, bytes.data())) return false;
    if (!of_bytes(codes) || !is_flat(codes, bytes[0], device) || !is_flat(scales, bytes[1] / 2, device)) return false;
    if (zeros && (!of_bytes(*zeros) || !is_flat(*zeros, bytes[2], device))) return false;
    if (bias && !is_flat(*bias, rows, device)) return false;
    weight.codes = codes.data_ptr();
    weight.scales = scales.data_ptr();
    weight.zeros = zeros ? zeros->data_ptr() : nullptr;
    task->x = x.data_ptr();
    task->kind = kind_of(x);
    task->tokens = x.numel() / columns;
    task->x_stride = columns;
    task->bias = bias ? bias->data_ptr() : nullptr;
    task->bias_kind = bias ? kind_of(*bias) : 0;
    task->path = LLMQUANT_CUDA_AUTO;
    task->overlap = 1;
    return true;
}

// Zeros, to which the product that gets them sets them again: so those of one stream share theirs. Those that have
// become too short are freed on their stream, after what uses them there.
std::optional<Tensor> tickets_of(void* stream, int64_t count, Device device) {
    static std::mutex mutex;
    static auto& held = *new std::map<std::pair<int32_t, void*>, Tensor>;  // for good: at exit torch is gone before it
    const std::lock_guard<std::mutex> lock(mutex);
    const auto place = std::make_pair(device.index, stream);
    const auto found = held.find(place);
    if (found != held.end() && found->second.numel() >= count) return found->second;
    const std::optional<Tensor> made = empty({count}, ScalarType::Int, device);
    if (!made || aoti_torch_zero_(made->get())) return std::nullopt;
    held.insert_or_assign(place, *made);
    return made;
}

// Nothing: not by the library, or not now. It has done nothing then.
std::optional<Tensor> multiply(const Operands& given) {
    const Device device = device_of(given.x);
    LlmquantCudaLinear task = {};
    if (!describe(given, device, &task)) return std::nullopt;

    std::optional<torch::stable::accelerator::DeviceGuard> guard;  // the library works on the current device
    if (device.index >= 0) guard.emplace(device.index);
    void* stream = nullptr;
    int32_t capturing = 0;
    if (current_stream(device.index, &stream) || is_capturing(stream, &capturing) || capturing) return std::nullopt;

    std::array<int64_t, 2> needs = {};
    if (llmquant_cuda_workspace(&task, needs.data())) return std::nullopt;
    std::vector<int64_t> sizes(given.x.sizes().begin(), given.x.sizes().end());
    sizes.back() = given.rows;
    const std::optional<Tensor> y = empty(sizes, given.x.scalar_type(), device);
    if (!y) return std::nullopt;
    task.y = y->data_ptr();
    std::optional<Tensor> partials, tickets;  // alive until the product has been launched
    if (needs[0]) {
        partials = empty({needs[0]}, ScalarType::Byte, device);
        tickets = tickets_of(stream, needs[1], device);
        if (!partials || !tickets) return std::nullopt;
        task.partials = partials->data_ptr();
        task.partials_bytes = needs[0];
        task.tickets = static_cast<uint32_t*>(tickets->data_ptr());
        task.tickets_count = tickets->numel();
    }
    const int64_t code = llmquant_cuda_linear(&task, stream);
    if (code > 0) throw std::runtime_error(std::string("llmquant_cuda_linear: ") + llmquant_cuda_message(code));
    return code ? std::nullopt : y;
}

Tensor w4_linear(const Tensor& x, const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& zeros,
                 const std::optional<Tensor>& bias, int64_t rows, int64_t bits, int64_t group_size, int64_t planes) {
    const Operands given = {x, codes, scales, zeros, bias, rows, bits, group_size, planes};
    const std::optional<Tensor> y = multiply(given);
    return y ? *y : by_python(given);
}

}  // namespace
}  // namespace llmquant

// From now on torch calls this for products on GPUs; with null, no longer. Returns null, or what is in the way.
LLMQUANT_CUDA_EXPORT const char* llmquant_torch_cuda_serve(llmquant::CurrentStream* current_stream,
                                                           llmquant::IsCapturing* is_capturing) {
    static std::mutex mutex;
    static TorchLibraryHandle registered = nullptr;
    const std::lock_guard<std::mutex> lock(mutex);
    if (registered) aoti_torch_delete_library_object(std::exchange(registered, nullptr));
    if (!current_stream || !is_capturing) return nullptr;
    if (llmquant_cuda_abi() != LLMQUANT_CUDA_ABI) return "it belongs to another llmquant_cuda.so";
    llmquant::current_stream = current_stream;
    llmquant::is_capturing = is_capturing;
    if (aoti_torch_library_init_impl(LLMQUANT_OPERATORS, LLMQUANT_DISPATCH_KEY, __FILE__, __LINE__, &registered) ||
        torch_library_impl(registered, "w4_linear", TORCH_BOX(&llmquant::w4_linear), TORCH_ABI_VERSION))
        return "torch does not take it";
    return nullptr;
}
