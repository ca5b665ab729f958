// SPDX-License-Identifier: Apache-2.0
#include "support.h"

namespace tenp::test {
namespace {

using Ints = std::vector<std::int32_t>;

/// route() of ids [tokens, per_token], with its outputs poisoned beforehand.
struct Routed {
    Routed(Ints ids_, std::int64_t tokens, std::int64_t per_token, std::int64_t experts)
        : ids(std::move(ids_)),
          offsets(experts + 1, -7),
          slots(tokens * per_token, -7),
          rows(tokens * per_token, -7),
          args{
              .expert_ids = contiguous_view(ids.data(), {tokens, per_token}),
              .offsets = offsets.view(),
              .slots = slots.view(),
              .rows = rows.view({tokens, per_token}),
          } {
        route(args);
    }

    Ints ids;
    Guarded<std::int32_t> offsets;
    Guarded<std::int32_t> slots;
    Guarded<std::int32_t> rows;
    RoutingArgs args;
};

}  // namespace

TEST_CASE("rows are ordered by expert, then token, then slot") {
    Routed routed({2, 0, 1, 2, 0, 2}, 3, 2, 3);
    CHECK(routed.offsets.values() == Ints{0, 2, 3, 6});
    CHECK(routed.slots.values() == Ints{1, 4, 2, 0, 3, 5});
    CHECK(routed.rows.values() == Ints{3, 0, 2, 4, 1, 5});
}

TEST_CASE("an id outside the experts names none and leaves a tail of -1") {
    Routed routed({-1, 1, 5, 0, INT32_MIN, INT32_MAX}, 3, 2, 2);
    CHECK(routed.offsets.values() == Ints{0, 1, 2});
    CHECK(routed.slots.values() == Ints{3, 1, -1, -1, -1, -1});
    CHECK(routed.rows.values() == Ints{-1, 1, -1, 0, -1, -1});
}

TEST_CASE("a token that names an expert twice has two rows") {
    Routed routed({1, 1}, 1, 2, 2);
    CHECK(routed.offsets.values() == Ints{0, 0, 2});
    CHECK(routed.slots.values() == Ints{0, 1});
}

TEST_CASE("no tokens, no slots and no experts are legal") {
    CHECK(Routed({}, 0, 4, 2).offsets.values() == Ints{0, 0, 0});
    CHECK(Routed({}, 4, 0, 2).offsets.values() == Ints{0, 0, 0});
    CHECK(Routed({0, 1}, 1, 2, 0).slots.values() == Ints{-1, -1});
}

TEST_CASE("route refuses what does not fit and says how") {
    Routed routed({0, 1}, 1, 2, 2);
    const auto refusal_of = [&](auto change) {
        RoutingArgs args = routed.args;
        change(args);
        return refusal([&] { route(args); });
    };
    CHECK(refusal_of([](RoutingArgs& args) {
              args.slots.shape[0] = 3;
          }) == "route: slots must be [2], got [3]");
    CHECK(refusal_of([](RoutingArgs& args) {
              args.rows.dtype = DType::kInt64;
          }) == "route: rows must be int32, got int64");
    CHECK(refusal_of([](RoutingArgs& args) {
              args.expert_ids.rank = 1;
          }) == "route: expert_ids must be 2-dimensional, got 1");
    CHECK(refusal_of([](RoutingArgs& args) {
              args.offsets.device = Device::kCuda;
          }) == "route: offsets must be on cpu, got cuda:0");
    CHECK(refusal_of([](RoutingArgs& args) {
              for (TensorView* array : {&args.expert_ids, &args.offsets, &args.slots, &args.rows}) {
                  array->device = Device::kCuda;
              }
              args.slots.device_index = 1;
          }) == "route: slots must be on cuda:0, got cuda:1");
    CHECK(refusal_of([](RoutingArgs& args) {
              args.offsets.stride[0] = 2;
          }) == "route: offsets must be contiguous, got strides [2]");
    CHECK(refusal_of([](RoutingArgs& args) {
              args.slots.data = nullptr;
          }) == "route: slots must be an array of shape [2], got no memory");
    CHECK(refusal_of([](RoutingArgs& args) {
              args.slots.data = args.expert_ids.data;
          }) == "route: slots must be memory of its own, got an overlap with expert_ids");
    CHECK(refusal_of([](RoutingArgs& args) {
              args.rows.data = args.slots.data;
          }) == "route: slots must be memory of its own, got an overlap with rows");
    CHECK(refusal_of([](RoutingArgs& args) {
              args.slots.data = static_cast<char*>(args.slots.data) + 1;
          }) == "route: slots must be aligned to int32, got another address");
    CHECK(refusal_of([](RoutingArgs& args) {
              args.offsets.shape[0] = 0;
          }) == "route: offsets must be [experts + 1], got [0]");
    CHECK(
        refusal_of([](RoutingArgs& args) { args.expert_ids.shape = {1 << 20, 1 << 20}; }) ==
        "route: expert_ids must be at most 2147483647 slots in all, got [1048576, 1048576]"
    );
    CHECK(refusal_of([](RoutingArgs& args) { args.expert_ids.shape = {-1, 2}; }) != "");
    CHECK(refusal_of([](RoutingArgs& args) {
              args.expert_ids.shape = {std::int64_t{1} << 62, std::int64_t{1} << 62};
          }) != "");
}

TEST_CASE("tiles come by descending width, neuron blocks before row tiles") {
    Guarded<std::int32_t> offsets{0, 3, 3, 8, 9};
    Guarded<std::int32_t> widths{16, 64, 40, 16};
    Guarded<std::int32_t> tiles(4 * 8);
    Guarded<std::int32_t> count(1);
    tile_table({
        .offsets = offsets.view(),
        .widths = widths.view(),
        .tiles = tiles.view({8, 4}),
        .count = count.view(),
        .tile_rows = 4,
        .tile_neurons = 32,
    });
    CHECK(count[0] == 6);
    CHECK(
        tiles.values() == Ints{
                              2,  3,  4,  0,   //
                              2,  7,  1,  0,   //
                              2,  3,  4,  32,  //
                              2,  7,  1,  32,  //
                              0,  0,  3,  0,   //
                              3,  8,  1,  0,   //
                              -1, -1, -1, -1,  //
                              -1, -1, -1, -1,  //
                          }
    );
}

TEST_CASE("tile_capacity is enough for the worst routing and not more") {
    // Rows spread so that every expert but the last ends in a tile of one row.
    for (const std::int64_t rows : {0, 1, 3, 7, 20, 100}) {
        for (const std::int64_t experts : {1, 2, 5, 8}) {
            Guarded<std::int32_t> offsets(experts + 1);
            Guarded<std::int32_t> widths(experts, 33);
            for (std::int64_t expert = 0; expert < experts; ++expert) {
                const bool last = expert + 1 == experts;
                offsets[expert + 1] = static_cast<std::int32_t>(
                    last ? rows : std::min<std::int64_t>(rows, expert + 1)
                );
            }
            const std::int64_t capacity = tile_capacity(rows, experts, 33, 4, 16);
            Guarded<std::int32_t> tiles(4 * capacity);
            Guarded<std::int32_t> count(1);
            tile_table({
                .offsets = offsets.view(),
                .widths = widths.view(),
                .tiles = tiles.view({capacity, 4}),
                .count = count.view(),
                .tile_rows = 4,
                .tile_neurons = 16,
            });
            CHECK(count[0] <= capacity);
            CHECK(count[0] >= capacity - 3);  // one partial row tile fewer, in 3 neuron blocks
        }
    }
    CHECK(tile_capacity(10, 0, 64, 4, 16) == 0);
    CHECK_THROWS_AS(tile_capacity(-1, 1, 1, 1, 1), InvalidArgument);
    CHECK_THROWS_AS(tile_capacity(1, 1, 1, 0, 1), InvalidArgument);
}

TEST_CASE("tile_table refuses bad values and a short table") {
    Guarded<std::int32_t> offsets{0, 3};
    Guarded<std::int32_t> widths{16};
    Guarded<std::int32_t> tiles(4);
    Guarded<std::int32_t> count(1);
    const TileTableArgs args{
        .offsets = offsets.view(),
        .widths = widths.view(),
        .tiles = tiles.view({1, 4}),
        .count = count.view(),
        .tile_rows = 2,
        .tile_neurons = 16,
    };
    CHECK(refusal([&] { tile_table(args); }).find("tile_table: tiles must be") == 0);
    offsets[0] = 4;
    CHECK(
        refusal([&] { tile_table(args); }) ==
        "tile_table: offsets must be non-decreasing within 0..2147483647, got 3 at index 1 after 4"
    );
    offsets[0] = 0;
    widths[0] = -1;
    CHECK(refusal([&] { tile_table(args); }).find("tile_table: widths must be within 0..") == 0);
}

}  // namespace tenp::test
