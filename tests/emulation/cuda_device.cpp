// SPDX-License-Identifier: Apache-2.0
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_copy_from_and_resize_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/copy.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/histc.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>

// A device of torch named cuda whose memory is the host's, for a torch without CUDA. Its operations
// are those of the CPU, with what a GPU is strict about kept: arrays of one operation lie on one
// device, and fresh memory holds nothing of use. What runs on it beside them is tenp's kernels,
// emulated.

namespace {

using at::Tensor;

const c10::Device kDevice(c10::DeviceType::CUDA, 0);

struct Memory final : c10::Allocator {
    c10::DataPtr allocate(std::size_t bytes) override {
        // At least as cudaMalloc aligns, and not a byte more than was asked for; every float is
        // NaN.
        void* data = nullptr;
        if (bytes > 0) {
            TORCH_CHECK(posix_memalign(&data, 256, bytes) == 0, "no memory for ", bytes, " bytes");
            std::memset(data, 0xff, bytes);
        }
        return {data, data, &std::free, kDevice};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
    void copy_data(void* to, const void* from, std::size_t bytes) const override {
        std::memcpy(to, from, bytes);
    }
};

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
    c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
    c10::Device getDevice() const override { return kDevice; }
    c10::Stream getStream(c10::Device) const noexcept override {
        return c10::Stream(c10::Stream::DEFAULT, kDevice);
    }
    c10::Stream exchangeStream(c10::Stream) const noexcept override {
        return c10::Stream(c10::Stream::DEFAULT, kDevice);
    }
    void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
    void block(void*, const c10::Stream&) const override {}
    bool queryEvent(void*) const override { return true; }
};

Memory memory;

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

/// What autograd and torch.compile ask.
struct CUDAHooks final : at::CUDAHooksInterface {
    explicit CUDAHooks(at::CUDAHooksArgs) {}
    void init() const override {}
    bool hasCUDA() const override { return true; }
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
    c10::DeviceIndex deviceCount() const override { return 1; }
    c10::DeviceIndex getCurrentDevice() const override { return 0; }
};
using at::CUDAHooksArgs;
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)

Tensor empty(
    c10::SymIntArrayRef sizes,
    std::optional<c10::ScalarType> dtype,
    std::optional<c10::Layout>,
    std::optional<c10::Device>,
    std::optional<bool>,
    std::optional<c10::MemoryFormat> format
) {
    return at::detail::empty_generic(
        C10_AS_INTARRAYREF_SLOW(sizes), &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
        c10::dtype_or_default(dtype), format
    );
}

Tensor empty_strided(
    c10::SymIntArrayRef sizes,
    c10::SymIntArrayRef strides,
    std::optional<c10::ScalarType> dtype,
    std::optional<c10::Layout>,
    std::optional<c10::Device>,
    std::optional<bool>
) {
    return at::detail::empty_strided_generic(
        C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), &memory,
        c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype)
    );
}

/// The same elements as an array of the CPU.
Tensor on_host(const Tensor& tensor) {
    return tensor.is_cpu() ? tensor
                           : at::from_blob(
                                 tensor.mutable_data_ptr(), tensor.sizes(), tensor.strides(),
                                 tensor.options().device(at::kCPU)
                             );
}

Tensor& copy_(Tensor& self, const Tensor& source, bool) {
    on_host(self).copy_(on_host(source));
    return self;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
    at::native::resize_(target, source.sizes(), std::nullopt);
    on_host(target).copy_(on_host(source));
    return target;
}

/// The CPU's, so that results differ from it by tenp's kernels alone; its gradient needs another
/// one.
Tensor attention(
    const Tensor& query,
    const Tensor& key,
    const Tensor& value,
    const std::optional<Tensor>& mask,
    double dropout,
    bool causal,
    std::optional<double> scale,
    bool gqa
) {
    if (at::GradMode::is_enabled() &&
        (query.requires_grad() || key.requires_grad() || value.requires_grad())) {
        return std::get<0>(at::_scaled_dot_product_attention_math(
            query, key, value, mask, dropout, causal, std::nullopt, scale, gqa
        ));
    }
    const auto host_mask = mask ? std::optional(on_host(*mask)) : std::nullopt;
    return at::scaled_dot_product_attention(
               on_host(query), on_host(key), on_host(value), host_mask, dropout, causal, scale, gqa
    )
        .to(query.device());
}

/// The CPU's takes no integers.
Tensor histc(const Tensor& self, int64_t bins, const at::Scalar& least, const at::Scalar& most) {
    return at::histc(on_host(self).to(at::kFloat), bins, least, most).to(self.options());
}

/// A single number may come from the CPU, as on a GPU, and so may indices: they are in optional
/// lists.
void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    bool on_cpu = false;
    const auto look = [&](const Tensor& tensor) {
        on_cpu = on_cpu || (tensor.defined() && tensor.is_cpu() && tensor.dim() > 0);
    };
    for (const c10::IValue& argument : torch::jit::last(*stack, op.schema().arguments().size())) {
        if (argument.isTensor()) {
            look(argument.toTensor());
        } else if (argument.isTensorList()) {
            for (const Tensor& tensor : argument.toTensorVector()) {
                look(tensor);
            }
        }
    }
    TORCH_CHECK(
        !on_cpu, "Expected all tensors to be on the same device, but ", op.schema().name(),
        " got some of cuda:0 and some of cpu"
    );
    at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

TORCH_LIBRARY_IMPL(_, CUDA, library) {
    library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
    c10::SetAllocator(c10::DeviceType::CUDA, &memory);
    library.impl("empty.memory_format", empty);
    library.impl("empty_strided", empty_strided);
    library.impl("as_strided", at::native::as_strided_tensorimpl);
    library.impl("view", at::native::view);
    library.impl("_reshape_alias", at::native::_reshape_alias);
    library.impl("unfold", at::native::unfold);
    library.impl("copy_", copy_);
    library.impl("_copy_from_and_resize", copy_from_and_resize);
    library.impl("histc", histc);
    library.impl("scaled_dot_product_attention", attention);
}

TORCH_LIBRARY_IMPL(aten, AutogradCUDA, library) {
    library.impl("scaled_dot_product_attention", attention);
}

}  // namespace
