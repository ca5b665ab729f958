// SPDX-License-Identifier: Apache-2.0
#include "tenp/routing.h"

#include <algorithm>
#include <string>

#include "core/backend.h"
#include "core/checks.h"
#include "tenp/error.h"

namespace tenp {
namespace {

/// The length of `offsets` is experts + 1.
std::int64_t experts_of(const Checks& check, Named offsets) {
    check.rank(offsets, 1);
    if (offsets.view.shape[0] < 1) {
        check.fail(offsets.name, "[experts + 1]", shape_text({offsets.view.shape[0]}));
    }
    return offsets.view.shape[0] - 1;
}

void positive(const Checks& check, std::string_view argument, std::int64_t value) {
    if (value < 1) {
        check.fail(argument, "positive", std::to_string(value));
    }
}

}  // namespace

void route(const RoutingArgs& args, Stream stream) {
    const Checks check("route", args.expert_ids);
    const Named expert_ids{"expert_ids", args.expert_ids};
    const Named offsets{"offsets", args.offsets};
    const Named slots{"slots", args.slots};
    const Named rows{"rows", args.rows};

    check.rank(expert_ids, 2);
    const std::int64_t tokens = args.expert_ids.shape[0];
    const std::int64_t per_token = args.expert_ids.shape[1];
    const std::int64_t slot_count = check.rows("expert_ids", tokens, per_token);
    const std::int64_t experts = experts_of(check, offsets);
    check.array(expert_ids, DType::kInt32, {tokens, per_token});
    check.array(offsets, DType::kInt32, {experts + 1});
    check.array(slots, DType::kInt32, {slot_count});
    check.array(rows, DType::kInt32, {tokens, per_token});
    check.apart({offsets, slots, rows, {"workspace", args.workspace}}, {expert_ids});

    if (check.device() == Device::kCuda) {
        check.workspace(args.workspace, cuda::route_workspace_bytes(slot_count, experts));
        cuda::route(args, stream);
    } else {
        cpu::route(args);
    }
}

std::size_t route_workspace_bytes(std::int64_t slots, std::int64_t experts) {
    const Checks check("route_workspace_bytes", TensorView{});
    check.size("slots", slots);
    check.size("experts", experts);
    return cuda::route_workspace_bytes(slots, experts);
}

void tile_table(const TileTableArgs& args, Stream stream) {
    const Checks check("tile_table", args.offsets);
    const Named offsets{"offsets", args.offsets};
    const Named widths{"widths", args.widths};
    const Named tiles{"tiles", args.tiles};
    const Named count{"count", args.count};

    const std::int64_t experts = experts_of(check, offsets);
    check.rank(tiles, 2);
    check.array(offsets, DType::kInt32, {experts + 1});
    check.array(widths, DType::kInt32, {experts});
    check.array(tiles, DType::kInt32, {args.tiles.shape[0], 4});
    check.array(count, DType::kInt32, {1});
    check.apart({tiles, count}, {offsets, widths});
    positive(check, "tile_rows", args.tile_rows);
    positive(check, "tile_neurons", args.tile_neurons);
    check.offsets(offsets, INT32_MAX);
    check.indices(widths, 0, experts, std::int64_t{INT32_MAX} + 1);

    if (check.device() == Device::kCuda) {
        cuda::tile_table(args, stream);
    } else {
        cpu::tile_table(args);
    }
}

std::int64_t tile_capacity(
    std::int64_t rows,
    std::int64_t experts,
    std::int64_t max_width,
    std::int32_t tile_rows,
    std::int32_t tile_neurons
) {
    const Checks check("tile_capacity", TensorView{});
    check.size("rows", rows);
    check.size("experts", experts);
    check.size("max_width", max_width);
    positive(check, "tile_rows", tile_rows);
    positive(check, "tile_neurons", tile_neurons);

    // Each expert with rows can end in one partial tile: the worst case has as many as possible of
    // them with a single row in it.
    const std::int64_t partial = std::min(experts, rows);
    const std::int64_t row_tiles = partial + (rows - partial) / tile_rows;
    const std::int64_t blocks = (max_width + tile_neurons - 1) / tile_neurons;
    return experts == 0 ? 0 : row_tiles * blocks;
}

}  // namespace tenp
