// SPDX-License-Identifier: Apache-2.0
#include "support.h"

namespace tenp::test {
namespace {

using Ints = std::vector<std::int32_t>;

Ints offsets_of(const Ints& widths) {
    const ExpertLayout layout(widths);
    return {layout.offsets().begin(), layout.offsets().end()};
}

}  // namespace

TEST_CASE("experts begin at multiples of 16 rows") {
    CHECK(offsets_of({0, 1, 15, 16, 17, 0}) == Ints{0, 0, 16, 32, 48, 80, 80});
    CHECK(offsets_of({}) == Ints{0});
    CHECK(ExpertLayout(Ints{17}).rows() == 32);
}

TEST_CASE("widths that are negative or too many are refused") {
    CHECK(refusal([] {
              ExpertLayout(Ints{4, -1});
          }) == "expert_layout: widths must be non-negative, got -1");
    CHECK_THROWS_AS(ExpertLayout(Ints{INT32_MAX}), InvalidArgument);
    CHECK_THROWS_AS(ExpertLayout(Ints{1 << 30, 1 << 30}), InvalidArgument);
}

TEST_CASE("packing an expert writes its rows, its padding and nothing else") {
    constexpr std::int64_t kHidden = 3;
    const ExpertLayout layout(Ints{2, 3, 1});
    for (const DType dtype : kFloats) {
        for (const bool gated : {false, true}) {
            CAPTURE(dtype_name(dtype));
            CAPTURE(gated);
            Matrix gate(dtype, 3, kHidden, 2);
            Matrix up(dtype, 3, kHidden, 1);
            Matrix down(dtype, kHidden, 3, 4);
            Matrix gate_up(dtype, (gated ? 2 : 1) * layout.rows(), kHidden);
            Matrix packed_down(dtype, layout.rows(), kHidden);
            gate.fill(1);
            up.fill(2);
            down.fill(3);
            pack_expert(
                layout, 1,
                {
                    .gate = gated ? gate.view() : TensorView{},
                    .up = up.view(),
                    .down = down.view(),
                    .gate_up = gate_up.view(),
                    .packed_down = packed_down.view(),
                    .gated = gated,
                }
            );
            const std::int64_t up_row = gated ? layout.rows() : 0;
            for (std::int64_t row = 0; row < layout.rows(); ++row) {
                const std::int64_t neuron = row - 16;
                const bool own = neuron >= 0 && neuron < 16;
                for (std::int64_t h = 0; h < kHidden; ++h) {
                    CHECK(std::isnan(packed_down.get(row, h)) == !own);
                    if (own) {
                        const bool padding = neuron >= 3;
                        CHECK(gate_up.get(up_row + row, h) == (padding ? 0 : up.get(neuron, h)));
                        CHECK(packed_down.get(row, h) == (padding ? 0 : down.get(h, neuron)));
                        if (gated) {
                            CHECK(gate_up.get(row, h) == (padding ? 0 : gate.get(neuron, h)));
                        }
                    }
                }
            }
        }
    }
}

TEST_CASE("pack_expert refuses another width and an expert that is not there") {
    const ExpertLayout layout(Ints{2});
    Matrix up(DType::kFloat32, 3, 4);
    Matrix down(DType::kFloat32, 4, 2);
    Matrix gate_up(DType::kFloat32, 16, 4);
    Matrix packed_down(DType::kFloat32, 16, 4);
    const PackExpertArgs args{
        .gate = {},
        .up = up.view(),
        .down = down.view(),
        .gate_up = gate_up.view(),
        .packed_down = packed_down.view(),
        .gated = false,
    };
    CHECK(refusal([&] {
              pack_expert(layout, 0, args);
          }) == "pack_expert: up must be [2, 4], got [3, 4]");
    CHECK(refusal([&] {
              pack_expert(layout, 1, args);
          }) == "pack_expert: expert must be within 0..0, got 1");
}

}  // namespace tenp::test
