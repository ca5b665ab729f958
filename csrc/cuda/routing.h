// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cuda/workspace.h"
#include "tenp/tensor.h"

// Routing for the other ops of this backend: plain pointers, nothing checked.

namespace tenp::cuda {

struct Routing {
    const std::int32_t* ids;  // [slots]
    std::int32_t slot_count;
    std::int32_t experts;
    std::int32_t* offsets;    // [E+1]
    std::int32_t* slots;      // [slots]
    std::int32_t* rows;       // [slots]
    std::int32_t* histogram;  // [E, chunks], from take_histogram()
};

std::int32_t* take_histogram(Workspace& workspace, std::int64_t slot_count, std::int64_t experts);
void route(const Routing& routing, Stream stream);

struct TileTable {
    const std::int32_t* offsets;  // [E+1]
    const std::int32_t* widths;   // [E]; nullptr when `columns` is given: all the same
    std::int32_t experts;
    std::int32_t tile_rows;
    std::int32_t tile_neurons;
    /// When not negative, every expert has this many columns instead of its width, which then only
    /// decides the order.
    std::int32_t columns = -1;
    std::int32_t capacity;
    std::int32_t* tiles;              // [capacity, 4]
    std::int32_t* count;              // [1]
    std::int32_t* cleared = nullptr;  // [1], set to 0 when there is one
};

void tile_table(const TileTable& table, Stream stream);

}  // namespace tenp::cuda
