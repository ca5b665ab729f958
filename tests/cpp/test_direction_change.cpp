// SPDX-License-Identifier: Apache-2.0
#include "support.h"

namespace tenp::test {
namespace {

struct Case {
    explicit Case(DType dtype) : hidden(dtype, 3, 2, 1), outputs(dtype, 5, 2, 1) {
        hidden.set(0, 0, 2);
        hidden.set(0, 1, 0);
        hidden.fill_row(1, 0);
        hidden.fill_row(2, 1);
        // Along x, against x, across x, from x = 0, and a row of nobody.
        const double y[4][2] = {{3, 0}, {-3, 0}, {0, 3}, {3, 4}};
        for (int row = 0; row < 4; ++row) {
            outputs.set(row, 0, y[row][0]);
            outputs.set(row, 1, y[row][1]);
        }
        outputs.fill_row(4, kNan);
    }

    DirectionChangeArgs args() {
        return {
            .hidden = hidden.view(),
            .outputs = outputs.view(),
            .tokens = tokens.view(),
            .gates = gates.view(),
            .offsets = offsets.view(),
            .direction_change = direction_change.view(),
        };
    }

    Matrix hidden;
    Matrix outputs;
    Guarded<std::int32_t> tokens{0, 0, 0, 1, -1};
    Guarded<float> gates{1, 1, 0.5, 2, static_cast<float>(kNan)};
    Guarded<std::int32_t> offsets{0, 1, 3, 4};
    Guarded<double> direction_change{100, 0, 0};
};

}  // namespace

TEST_CASE("an answer counts by its length and by how far it turns away") {
    for (const DType dtype : kFloats) {
        CAPTURE(dtype_name(dtype));
        Case c(dtype);
        accumulate_direction_change(c.args());
        CHECK(c.direction_change[0] == 100);          // 3 (1 - 1)
        CHECK(c.direction_change[1] == 6 + 0.5 * 3);  // 3 (1 + 1), then g = 0.5, cos = 0
        CHECK(c.direction_change[2] == 2 * 5);        // x = 0 has no direction
    }
}

TEST_CASE("an answer of 0 contributes 0") {
    Case c(DType::kFloat32);
    c.outputs.fill_row(0, 0);
    c.hidden.fill_row(0, kNan);
    accumulate_direction_change(c.args());
    CHECK(c.direction_change[0] == 100);
}

TEST_CASE("a row in use that names no token is refused, one that is not in use is not read") {
    Case c(DType::kFloat32);
    c.tokens[3] = 3;
    CHECK(refusal([&] {
              accumulate_direction_change(c.args());
          }) == "accumulate_direction_change: tokens must be within 0..2, got 3 at index 3");
    c.tokens[3] = 1;
    c.tokens[4] = INT32_MAX;
    accumulate_direction_change(c.args());
    CHECK(c.direction_change[2] == 10);
}

}  // namespace tenp::test
