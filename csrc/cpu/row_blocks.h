// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace tenp::cpu {

/// Consecutive rows of one expert.
struct RowBlock {
    std::int64_t expert;
    std::int64_t row;
    std::int64_t rows;
};

/// Every expert's rows, cut into blocks of at most `most` rows from its first row on.
inline std::vector<RowBlock> row_blocks_of(
    const std::int32_t* offsets, std::int64_t experts, std::int64_t most
) {
    std::vector<RowBlock> blocks;
    for (std::int64_t expert = 0; expert < experts; ++expert) {
        const std::int64_t last = offsets[expert + 1];
        for (std::int64_t row = offsets[expert]; row < last; row += most) {
            blocks.push_back({expert, row, std::min(most, last - row)});
        }
    }
    return blocks;
}

}  // namespace tenp::cpu
