// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cuda/routing.h"
#include "cuda/workspace.h"
#include "tenp/routing.h"

namespace tenp::cuda {

/// Tiles to work on, and the number of those that were taken beyond one per block.
struct Work {
    const std::int32_t* tiles;  // [count, 4]: expert, first row, rows, first column
    const std::int32_t* count;  // [1]
    std::int32_t* taken;        // [1], starts at 0
};

/// The tiles of a grouped product, in a workspace.
struct TileWork {
    std::int64_t capacity;
    std::int32_t tile_rows;
    std::int32_t tile_columns;
    Work work;

    /// Room for any routing of `rows` rows to experts of at most `columns` columns.
    TileWork(
        Workspace& workspace,
        std::int64_t rows,
        std::int64_t experts,
        std::int64_t columns,
        std::int32_t rows_of_tile,
        std::int32_t columns_of_tile
    )
        : capacity(tile_capacity(rows, experts, columns, rows_of_tile, columns_of_tile)),
          tile_rows(rows_of_tile),
          tile_columns(columns_of_tile),
          work{workspace.take<std::int32_t>(4 * capacity), nullptr, nullptr} {
        work.count = workspace.take<std::int32_t>(1);
        work.taken = workspace.take<std::int32_t>(1);
    }

    /// Starts the kernel that lists them, experts by descending width (`widths` nullptr: all the
    /// same). An expert has its width of columns, or `columns` when that is not negative.
    void fill(
        const std::int32_t* offsets,
        const std::int32_t* widths,
        std::int32_t experts,
        std::int32_t columns,
        Stream stream
    ) const {
        tile_table(
            {
                .offsets = offsets,
                .widths = widths,
                .experts = experts,
                .tile_rows = tile_rows,
                .tile_neurons = tile_columns,
                .columns = columns,
                .capacity = static_cast<std::int32_t>(capacity),
                .tiles = const_cast<std::int32_t*>(work.tiles),
                .count = const_cast<std::int32_t*>(work.count),
                .cleared = work.taken,
            },
            stream
        );
    }
};

}  // namespace tenp::cuda
