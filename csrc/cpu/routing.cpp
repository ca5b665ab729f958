// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstddef>
#include <numeric>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/dispatch.h"
#include "tenp/error.h"

namespace tenp::cpu {

void route(const RoutingArgs& args) {
    const std::int64_t experts = args.offsets.shape[0] - 1;
    const std::int64_t slot_count = args.slots.shape[0];
    const auto* ids = data<const std::int32_t>(args.expert_ids);
    auto* offsets = data<std::int32_t>(args.offsets);
    auto* slots = data<std::int32_t>(args.slots);
    auto* rows = data<std::int32_t>(args.rows);
    const auto names_expert = [&](std::int64_t slot) {
        return ids[slot] >= 0 && ids[slot] < experts;
    };

    // A counting sort that keeps the order of slots. offsets[e + 1] counts expert e's rows, ...
    std::fill_n(offsets, experts + 1, 0);
    for (std::int64_t slot = 0; slot < slot_count; ++slot) {
        if (names_expert(slot)) {
            ++offsets[ids[slot] + 1];
        }
    }
    std::partial_sum(offsets, offsets + experts + 1, offsets);

    // ... offsets[e] is then the next free row of expert e, which ends as the first of e + 1, ...
    const std::int32_t row_count = offsets[experts];
    for (std::int64_t slot = 0; slot < slot_count; ++slot) {
        rows[slot] = -1;
        if (names_expert(slot)) {
            const std::int32_t row = offsets[ids[slot]]++;
            rows[slot] = row;
            slots[row] = static_cast<std::int32_t>(slot);
        }
    }
    std::fill(slots + row_count, slots + slot_count, -1);

    // ... so everything moves up by one expert.
    std::copy_backward(offsets, offsets + experts, offsets + experts + 1);
    offsets[0] = 0;
}

void tile_table(const TileTableArgs& args) {
    const std::int64_t experts = args.widths.shape[0];
    const std::int64_t capacity = args.tiles.shape[0];
    const auto* offsets = data<const std::int32_t>(args.offsets);
    const auto* widths = data<const std::int32_t>(args.widths);
    auto* tiles = data<std::int32_t>(args.tiles);

    std::vector<std::int32_t> order(static_cast<std::size_t>(experts));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
        return widths[a] > widths[b];
    });

    std::int64_t count = 0;
    for (const std::int32_t expert : order) {
        const std::int64_t last = offsets[expert + 1];
        for (std::int64_t neuron = 0; neuron < widths[expert]; neuron += args.tile_neurons) {
            for (std::int64_t row = offsets[expert]; row < last; row += args.tile_rows) {
                if (count == capacity) {
                    throw InvalidArgument(
                        "tile_table: tiles must be [tile_capacity(), 4], got [" +
                        std::to_string(capacity) + ", 4], which is too short"
                    );
                }
                std::int32_t* tile = tiles + 4 * count++;
                tile[0] = expert;
                tile[1] = static_cast<std::int32_t>(row);
                tile[2] =
                    static_cast<std::int32_t>(std::min<std::int64_t>(args.tile_rows, last - row));
                tile[3] = static_cast<std::int32_t>(neuron);
            }
        }
    }
    std::fill(tiles + 4 * count, tiles + 4 * capacity, -1);
    *data<std::int32_t>(args.count) = static_cast<std::int32_t>(count);
}

}  // namespace tenp::cpu
