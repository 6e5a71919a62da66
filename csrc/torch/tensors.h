// What the bindings to torch share: tensors, through its stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace llmquant {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A kind of numbers as csrc/cpu/linear.h and csrc/cuda/llmquant_cuda.h both number them; -1: it is none of theirs.
inline int64_t kind_of(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case ScalarType::BFloat16:
            return 0;
        case ScalarType::Half:
            return 1;
        case ScalarType::Float:
            return 2;
        default:
            return -1;
    }
}

inline bool of_bytes(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Byte; }

struct Device {
    int32_t type = 0, index = 0;
};

inline Device device_of(const Tensor& tensor) {
    Device device;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device.type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device.index));
    return device;
}

// Contiguous, and not initialized; nothing if there is no room for it.
inline std::optional<Tensor> empty(const std::vector<int64_t>& sizes, ScalarType type, Device device) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (std::size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * sizes[i];
    AtenTensorHandle made = nullptr;
    if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                 static_cast<int32_t>(type), device.type, device.index, &made))
        return std::nullopt;
    return Tensor(made);
}

}  // namespace llmquant
