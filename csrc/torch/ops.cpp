// torch.ops.llmquant.w4_linear on the CPU, through torch's stable ABI: built once, it serves every torch from 2.10 on.
// The operator is defined, and computed on other devices, in llmquant/kernels/ops.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "../cpu/linear.h"
#include "tensors.h"

namespace llmquant {
namespace {

static_assert(LLMQUANT_BF16 == 0 && LLMQUANT_FP16 == 1 && LLMQUANT_FP32 == 2, "kind_of numbers them so");

int64_t known_kind_of(const Tensor& tensor, const char* name) {
    const int64_t kind = kind_of(tensor);
    STD_TORCH_CHECK(kind >= 0, "w4_linear: ", name, " is of no dtype that is served; use bf16, fp16 or fp32");
    return kind;
}

std::string text(const Tensor& tensor) {
    std::string sizes;
    for (int64_t i = 0; i < tensor.dim(); ++i) sizes += (i ? ", " : "") + std::to_string(tensor.size(i));
    return "(" + sizes + ")" + (tensor.is_contiguous() ? "" : ", not contiguous");
}

// The kernels trust the sizes that they are given: this is where they are checked.
const void* checked(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes, bool right_type) {
    bool right =
        right_type && tensor.is_cpu() && tensor.is_contiguous() && tensor.dim() == static_cast<int64_t>(sizes.size());
    int64_t i = 0;
    for (int64_t size : sizes) right = right && tensor.size(i++) == size;
    STD_TORCH_CHECK(right, "w4_linear: ", name, " is ", text(tensor), ", or of another dtype; see kernels/layout.py");
    return tensor.data_ptr();
}

Tensor w4_linear(const Tensor& given, const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& zeros,
                 const std::optional<Tensor>& bias, int64_t rows, int64_t bits, int64_t group_size, int64_t planes) {
    STD_TORCH_CHECK(bits == 4 || bits == 8, "w4_linear: bits is ", bits, "; use 4 or 8");
    STD_TORCH_CHECK(planes == 1 || planes == 2, "w4_linear: planes is ", planes, "; use 1 or 2");
    STD_TORCH_CHECK(rows > 0 && given.dim() > 0 && given.size(given.dim() - 1) > 0, "w4_linear: x is ", text(given));
    STD_TORCH_CHECK(group_size == -1 || (group_size > 0 && group_size % LLMQUANT_CHUNK == 0),
                    "w4_linear: group_size is ", group_size, "; use -1 or a multiple of ", LLMQUANT_CHUNK);
    const Tensor x = given.is_contiguous() ? given : torch::stable::contiguous(given);
    const int64_t columns = x.size(x.dim() - 1), panels = (rows + LLMQUANT_PANEL - 1) / LLMQUANT_PANEL;
    const int64_t group = group_size == -1 ? columns : group_size, groups = (columns + group - 1) / group;

    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = rows;
    const std::optional<Tensor> y = empty(sizes, x.scalar_type(), device_of(x));
    STD_TORCH_CHECK(y, "w4_linear: no memory for the results of ", text(x), " activations");

    LlmquantLinear task = {};
    task.x = x.data_ptr();
    task.x_kind = known_kind_of(x, "x");
    const int64_t steps = padded(columns) * bits / 32;
    task.codes =
        static_cast<const uint8_t*>(checked(codes, "codes", {panels, steps, LLMQUANT_PANEL, 4}, of_bytes(codes)));
    task.scale_kind = known_kind_of(scales, "scales");
    task.scales = checked(scales, "scales", {panels, groups, LLMQUANT_PANEL}, true);
    if (zeros)
        task.zeros =
            static_cast<const uint8_t*>(checked(*zeros, "zeros", {panels, groups, LLMQUANT_PANEL}, of_bytes(*zeros)));
    if (bias) {
        task.bias_kind = known_kind_of(*bias, "bias");
        task.bias = checked(*bias, "bias", {rows}, true);
    }
    task.y = y->data_ptr();
    task.tokens = x.numel() / columns;
    task.rows = rows;
    task.columns = columns;
    task.group = group;
    task.bits = bits;
    task.planes = planes;
    task.threads = torch::stable::get_num_threads();
    STD_TORCH_CHECK(llmquant_linear(&task) == 0, "w4_linear: no memory for ", text(x), " activations");
    return *y;
}

}  // namespace
}  // namespace llmquant

STABLE_TORCH_LIBRARY_IMPL(llmquant, CPU, library) { library.impl("w4_linear", TORCH_BOX(&llmquant::w4_linear)); }
