// SPDX-License-Identifier: Apache-2.0
#include "tenp/expert_layout.h"

#include <cstdint>
#include <cstring>
#include <string>

#include "core/checks.h"
#include "core/dispatch.h"
#include "tenp/error.h"

namespace tenp {
namespace {

/// Copies a strided [rows, cols] matrix into contiguous rows and zeroes `padding` rows after it.
/// Elements are moved as bit patterns.
template <class Bits>
void copy_rows(
    const TensorView& source,
    std::size_t row_axis,
    TensorView target,
    std::int64_t first_row,
    std::int64_t padding
) {
    const std::size_t column_axis = 1 - row_axis;
    const std::int64_t rows = source.shape[row_axis];
    const std::int64_t columns = source.shape[column_axis];
    auto* out = data<Bits>(target) + first_row * columns;
    for (std::int64_t row = 0; row < rows; ++row) {
        const auto* in = data<const Bits>(source) + row * source.stride[row_axis];
        for (std::int64_t column = 0; column < columns; ++column) {
            *out++ = in[column * source.stride[column_axis]];
        }
    }
    if (padding * columns > 0) {
        std::memset(out, 0, static_cast<std::size_t>(padding * columns) * sizeof(Bits));
    }
}

}  // namespace

ExpertLayout::ExpertLayout(std::span<const std::int32_t> widths)
    : widths_(widths.begin(), widths.end()) {
    const Checks check("expert_layout", TensorView{});
    offsets_.reserve(widths.size() + 1);
    offsets_.push_back(0);
    std::int64_t rows = 0;
    for (const std::int32_t width : widths) {
        if (width < 0) {
            check.fail("widths", "non-negative", std::to_string(width));
        }
        rows += (std::int64_t{width} + kRowMultiple - 1) / kRowMultiple * kRowMultiple;
        if (rows > INT32_MAX) {
            check.fail("widths", "at most " + std::to_string(INT32_MAX) + " rows in all", "more");
        }
        offsets_.push_back(static_cast<std::int32_t>(rows));
    }
}

void pack_expert(const ExpertLayout& layout, std::int64_t expert, const PackExpertArgs& args) {
    const Checks check("pack_expert", args.up);
    const auto experts = static_cast<std::int64_t>(layout.widths().size());
    if (expert < 0 || expert >= experts) {
        check.fail("expert", "within 0.." + std::to_string(experts - 1), std::to_string(expert));
    }
    const Named gate{"gate", args.gate};
    const Named up{"up", args.up};
    const Named down{"down", args.down};
    const Named gate_up{"gate_up", args.gate_up};
    const Named packed_down{"packed_down", args.packed_down};

    const auto e = static_cast<std::size_t>(expert);
    const std::int64_t width = layout.widths()[e];
    const std::int64_t first_row = layout.offsets()[e];
    const std::int64_t padding = layout.offsets()[e + 1] - first_row - width;
    const std::int64_t rows = layout.rows();
    check.rank(up, 2);
    const std::int64_t hidden_size = args.up.shape[1];
    const DType dtype = args.up.dtype;
    check.is_float(up);
    if (args.gated) {
        check.array(gate, dtype, {width, hidden_size}, Layout::kAny);
    }
    check.array(up, dtype, {width, hidden_size}, Layout::kAny);
    check.array(down, dtype, {hidden_size, width}, Layout::kAny);
    check.array(gate_up, dtype, {args.gated ? 2 * rows : rows, hidden_size});
    check.array(packed_down, dtype, {rows, hidden_size});
    check.apart({gate_up, packed_down}, {up, down});
    if (args.gated) {
        check.apart({gate_up, packed_down}, {gate});
    }
    if (check.device() != Device::kCpu) {
        throw Unsupported("pack_expert: CUDA arrays are packed by their framework, not by tenp");
    }

    const auto copy = [&]<class Bits>() {
        if (args.gated) {
            copy_rows<Bits>(args.gate, 0, args.gate_up, first_row, padding);
        }
        const std::int64_t up_row = first_row + (args.gated ? rows : 0);
        copy_rows<Bits>(args.up, 0, args.gate_up, up_row, padding);
        copy_rows<Bits>(args.down, 1, args.packed_down, first_row, padding);
    };
    if (dtype == DType::kFloat32) {
        copy.template operator()<std::uint32_t>();
    } else {
        copy.template operator()<std::uint16_t>();
    }
}

}  // namespace tenp
