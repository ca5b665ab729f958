// SPDX-License-Identifier: Apache-2.0
#include <array>
#include <string_view>

#include "support.h"

namespace tenp::test {

TEST_CASE("a contiguous view is row-major and takes its dtype from the element") {
    const float values[24] = {};
    const TensorView view = contiguous_view(values, {2, 3, 4});
    CHECK(view.data == values);
    CHECK(view.dtype == DType::kFloat32);
    CHECK(view.device == Device::kCpu);
    CHECK(view.rank == 3);
    CHECK(view.shape == std::array<std::int64_t, 4>{2, 3, 4, 0});
    CHECK(view.stride == std::array<std::int64_t, 4>{12, 4, 1, 0});

    std::int64_t number = 0;
    CHECK(contiguous_view(&number, {1}).dtype == DType::kInt64);
    CHECK(contiguous_view(&number, DType::kBFloat16, {4}).dtype == DType::kBFloat16);
}

TEST_CASE("dtypes and devices have names and sizes") {
    CHECK(std::string_view(dtype_name(DType::kBFloat16)) == "bfloat16");
    CHECK(dtype_size(DType::kBFloat16) == 2);
    CHECK(dtype_size(DType::kFloat64) == 8);
    CHECK(dtype_size(DType::kUInt8) == 1);
    CHECK(std::string_view(device_name(Device::kCuda)) == "cuda");
}

TEST_CASE("the library has the version of its headers") {
    CHECK(std::string_view(version()) == TENP_VERSION);
}

TEST_CASE("CUDA is either available or explained") {
    CHECK(cuda_is_available() == cuda_unavailable_reason().empty());
}

TEST_CASE("every error is an Error and a std::runtime_error") {
    CHECK_THROWS_AS(throw InvalidArgument("x"), Error);
    CHECK_THROWS_AS(throw Unsupported("x"), Error);
    CHECK_THROWS_AS(throw DeviceError("x"), std::runtime_error);
}

}  // namespace tenp::test
