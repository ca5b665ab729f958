// SPDX-License-Identifier: Apache-2.0
#include "support.h"

namespace tenp::test {
namespace {

/// Three experts with 2, 0 and 1 rows; a fourth row belongs to nobody.
struct Case {
    explicit Case(DType dtype) : outputs(dtype, 4, 2, 3) {
        outputs.set(0, 0, 3);
        outputs.set(0, 1, 4);
        outputs.fill_row(1, 0);
        outputs.set(2, 0, -5);
        outputs.set(2, 1, 12);
        outputs.fill_row(3, kNan);
    }

    ActivationStatsArgs args() {
        return {
            .outputs = outputs.view(),
            .gates = gates.view(),
            .offsets = offsets.view(),
            .counts = counts.view(),
            .gate_sum = gate_sum.view(),
            .norm_sum = norm_sum.view(),
            .gated_norm_sum = gated_norm_sum.view(),
            .norm_max = norm_max.view(),
        };
    }

    Matrix outputs;
    Guarded<float> gates{0.5f, 0.25f, 2.0f, static_cast<float>(kNan)};
    Guarded<std::int32_t> offsets{0, 2, 2, 3};
    Guarded<std::int64_t> counts{10, 20, 30};
    Guarded<double> gate_sum{1, 2, 3};
    Guarded<double> norm_sum{0, 0, 0};
    Guarded<double> gated_norm_sum{0, 0, 0};
    Guarded<double> norm_max{7, 7, 7};
};

using Doubles = std::vector<double>;

}  // namespace

TEST_CASE("activation statistics are added to what is there") {
    for (const DType dtype : kFloats) {
        CAPTURE(dtype_name(dtype));
        Case c(dtype);
        accumulate_activation_stats(c.args());
        CHECK(c.counts.values() == std::vector<std::int64_t>{12, 20, 31});
        CHECK(c.gate_sum.values() == Doubles{1.75, 2, 5});
        CHECK(c.norm_sum.values() == Doubles{5, 0, 13});
        CHECK(c.gated_norm_sum.values() == Doubles{2.5, 0, 26});
        CHECK(c.norm_max.values() == Doubles{7, 7, 13});
    }
}

TEST_CASE("NaN spreads into the sums of its expert and nowhere else") {
    Case c(DType::kFloat32);
    c.outputs.set(0, 1, kNan);
    accumulate_activation_stats(c.args());
    CHECK(std::isnan(c.norm_sum[0]));
    CHECK(std::isnan(c.norm_max[0]));
    CHECK(c.norm_sum[2] == 13);
    CHECK(c.gate_sum.values() == Doubles{1.75, 2, 5});
}

TEST_CASE("a row of large values has a finite norm") {
    Case c(DType::kFloat32);
    c.outputs.fill_row(0, 3e38);
    accumulate_activation_stats(c.args());
    CHECK(c.norm_sum[0] == doctest::Approx(std::sqrt(2.0) * 3e38));
}

TEST_CASE("offsets that decrease or leave the rows are refused") {
    Case c(DType::kFloat32);
    c.offsets[1] = -1;
    CHECK_THROWS_AS(accumulate_activation_stats(c.args()), InvalidArgument);
    c.offsets[1] = 2;
    c.offsets[3] = 5;
    CHECK(
        refusal([&] { accumulate_activation_stats(c.args()); }) ==
        "accumulate_activation_stats: offsets must be non-decreasing within 0..4, "
        "got 5 at index 3 after 2"
    );
    CHECK(c.counts.values() == std::vector<std::int64_t>{10, 20, 30});
}

TEST_CASE("columns that are not contiguous are refused") {
    Case c(DType::kFloat32);
    ActivationStatsArgs args = c.args();
    args.outputs.stride = {1, 5};
    CHECK(
        refusal([&] { accumulate_activation_stats(args); }) ==
        "accumulate_activation_stats: outputs must be contiguous along its last dimension, "
        "got strides [1, 5]"
    );
}

TEST_CASE("CUDA arrays are refused with a reason when there is no CUDA") {
    if (cuda_is_available()) {
        return;
    }
    Case c(DType::kFloat32);
    ActivationStatsArgs args = c.args();
    for (TensorView* view :
         {&args.outputs, &args.gates, &args.offsets, &args.counts, &args.gate_sum, &args.norm_sum,
          &args.gated_norm_sum, &args.norm_max}) {
        view->device = Device::kCuda;
    }
    CHECK_THROWS_AS(accumulate_activation_stats(args), Error);
}

}  // namespace tenp::test
