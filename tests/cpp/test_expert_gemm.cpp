// SPDX-License-Identifier: Apache-2.0
#include <numeric>

#include "support.h"

namespace tenp::test {
namespace {

using Ints = std::vector<std::int32_t>;

struct Shape {
    DType dtype = DType::kFloat32;
    std::int64_t tokens = 5;
    std::int64_t per_token = 2;
    std::int64_t hidden_size = 20;
    Ints widths = {16, 3, 0, 40};
    Activation activation = Activation::kSilu;
    bool gated = true;
    bool biased = false;
};

/// A layer with random weights. Everything that must not be read is NaN.
class Layer {
 public:
    explicit Layer(const Shape& shape)
        : shape_(shape),
          layout_(shape.widths),
          experts_(std::ssize(shape.widths)),
          hidden(shape.dtype, shape.tokens, shape.hidden_size, 3),
          ids(shape.tokens * shape.per_token),
          gates(shape.tokens * shape.per_token),
          gate_up(shape.dtype, matrices() * layout_.rows(), shape.hidden_size),
          down(shape.dtype, layout_.rows(), shape.hidden_size),
          gate_up_bias(shape.dtype, 1, matrices() * layout_.rows()),
          down_bias(shape.dtype, experts_, shape.hidden_size),
          out(shape.dtype, shape.tokens, shape.hidden_size, 7),
          workspace(
              static_cast<std::int64_t>(expert_gemm_workspace_bytes(
                  shape.tokens,
                  shape.per_token,
                  shape.hidden_size,
                  experts_,
                  max_width(),
                  shape.dtype
              ))
          ) {
        hidden.fill(1);
        down_bias.fill(2);
        Matrix weights(shape.dtype, gate_up_rows(), shape.hidden_size);
        Matrix down_weights(shape.dtype, layout_.rows(), shape.hidden_size);
        Matrix biases(shape.dtype, 1, gate_up_rows());
        weights.fill(3);
        down_weights.fill(4);
        biases.fill(5);
        for (std::int64_t expert = 0; expert < experts_; ++expert) {
            for (std::int64_t neuron = 0; neuron < width(expert); ++neuron) {
                const std::int64_t row = first_row(expert) + neuron;
                copy_row(down_weights, down, row);
                for (std::int64_t matrix = 0; matrix < matrices(); ++matrix) {
                    const std::int64_t packed = matrix * layout_.rows() + row;
                    copy_row(weights, gate_up, packed);
                    gate_up_bias.set(0, packed, biases.get(0, packed));
                }
            }
        }
        std::mt19937 random(6);
        for (std::int64_t slot = 0; slot < ids.size(); ++slot) {
            // -1 and E name no expert; the gates of such slots are NaN.
            ids[slot] = static_cast<std::int32_t>(random() % static_cast<unsigned>(experts_ + 2));
            ids[slot] -= 1;
            const bool named = ids[slot] >= 0 && ids[slot] < experts_;
            gates[slot] = named ? static_cast<float>(random() % 9) / 8 : static_cast<float>(kNan);
        }
        std::fill_n(workspace.data(), workspace.size(), std::uint8_t{0xff});  // NaN
    }

    ExpertGemmArgs args() {
        return {
            .hidden = hidden.view(),
            .expert_ids = ids.view({shape_.tokens, shape_.per_token}),
            .gates = gates.view({shape_.tokens, shape_.per_token}),
            .gate_up = gate_up.view(),
            .down = down.view(),
            .widths = contiguous_view(shape_.widths.data(), {experts_}),
            .neuron_offsets = contiguous_view(layout_.offsets().data(), {experts_ + 1}),
            .gate_up_bias = shape_.biased ? gate_up_bias.view({gate_up_rows()}) : TensorView{},
            .down_bias = shape_.biased ? down_bias.view() : TensorView{},
            .activation = shape_.activation,
            .gated = shape_.gated,
            .limit = 3,
            .alpha = 1.5,
            .out = out.view(),
            .workspace = workspace.view(),
        };
    }

    /// Compares every token's result with its equations.
    void check() {
        expert_gemm(args());
        for (std::int64_t token = 0; token < shape_.tokens; ++token) {
            check_token(token);
        }
        CHECK(out.gaps_are_intact());
    }

 private:
    std::int64_t matrices() const { return shape_.gated ? 2 : 1; }
    std::int64_t gate_up_rows() const { return matrices() * layout_.rows(); }
    std::int64_t width(std::int64_t expert) const {
        return shape_.widths[static_cast<std::size_t>(expert)];
    }
    std::int64_t max_width() const {
        return shape_.widths.empty() ? 0 : *std::ranges::max_element(shape_.widths);
    }
    std::int64_t first_row(std::int64_t expert) const {
        return layout_.offsets()[static_cast<std::size_t>(expert)];
    }

    void copy_row(Matrix& from, Matrix& to, std::int64_t row) {
        for (std::int64_t h = 0; h < shape_.hidden_size; ++h) {
            to.set(row, h, from.get(row, h) / 4);
        }
    }

    void check_token(std::int64_t token) {
        std::vector<double> sum(static_cast<std::size_t>(shape_.hidden_size));
        std::vector<double> size = sum;  // of the terms, without their signs
        for (std::int64_t slot = token * shape_.per_token; slot < (token + 1) * shape_.per_token;
             ++slot) {
            const std::int64_t expert = ids[slot];
            if (expert < 0 || expert >= experts_) {
                continue;
            }
            const auto add = [&](double factor, Matrix& matrix, std::int64_t row) {
                for (std::int64_t h = 0; h < shape_.hidden_size; ++h) {
                    const double term = gates[slot] * factor * matrix.get(row, h);
                    sum[static_cast<std::size_t>(h)] += term;
                    size[static_cast<std::size_t>(h)] += std::abs(term);
                }
            };
            for (std::int64_t neuron = 0; neuron < width(expert); ++neuron) {
                const std::int64_t row = first_row(expert) + neuron;
                add(m(token, row), down, row);
            }
            if (shape_.biased) {
                add(1, down_bias, expert);
            }
        }
        double worst = 0;
        for (std::int64_t h = 0; h < shape_.hidden_size; ++h) {
            const auto at = static_cast<std::size_t>(h);
            // m may be rounded the other way when float32 and float64 disagree about a tie.
            const double tolerance = epsilon(shape_.dtype) * (std::abs(sum[at]) + 0.1 * size[at]) +
                                     1e-6 * size[at] + 1e-30;
            const double error = std::abs(out.get(token, h) - sum[at]) / tolerance;
            worst = error <= worst ? worst : error;  // a NaN is not <= and becomes the worst
        }
        CAPTURE(token);
        CHECK(worst <= 1);
    }

    double projection(std::int64_t token, std::int64_t packed_row) {
        double sum = shape_.biased ? gate_up_bias.get(0, packed_row) : 0;
        for (std::int64_t h = 0; h < shape_.hidden_size; ++h) {
            sum += hidden.get(token, h) * gate_up.get(packed_row, h);
        }
        return sum;
    }

    double m(std::int64_t token, std::int64_t row) {
        const double first = projection(token, row);
        const double second = shape_.gated ? projection(token, layout_.rows() + row) : 1;
        return rounded(activated(first, second), shape_.dtype);
    }

    double activated(double z, double up) const {
        switch (shape_.activation) {
            case Activation::kSilu: return z / (1 + std::exp(-z)) * up;
            case Activation::kGelu: return 0.5 * z * (1 + std::erf(z / std::sqrt(2.0))) * up;
            case Activation::kGeluTanh: {
                const double u = std::sqrt(2 / std::acos(-1.0)) * (z + 0.044715 * z * z * z);
                return 0.5 * z * (1 + std::tanh(u)) * up;
            }
            case Activation::kRelu: return std::max(z, 0.0) * up;
            case Activation::kRelu2: return std::max(z, 0.0) * std::max(z, 0.0) * up;
            case Activation::kSwigluOai: {
                const double gate = std::min(z, 3.0);
                return (std::clamp(up, -3.0, 3.0) + 1) * gate / (1 + std::exp(-1.5 * gate));
            }
        }
        return kNan;
    }

    Shape shape_;
    ExpertLayout layout_;
    std::int64_t experts_;

 public:
    Matrix hidden;
    Guarded<std::int32_t> ids;
    Guarded<float> gates;
    Matrix gate_up;
    Matrix down;
    Matrix gate_up_bias;
    Matrix down_bias;
    Matrix out;
    Guarded<std::uint8_t> workspace;
};

/// A shape that differs from the usual one.
Shape with(auto change) {
    Shape shape;
    change(shape);
    return shape;
}

}  // namespace

TEST_CASE("experts of any width give the result of the equations") {
    const Ints widths = {0, 1, 15, 16, 17, 63, 64, 65, 130};
    for (const DType dtype : kFloats) {
        for (const bool gated : {false, true}) {
            for (const bool biased : {false, true}) {
                CAPTURE(dtype_name(dtype));
                CAPTURE(gated);
                CAPTURE(biased);
                Layer({dtype, 40, 3, 24, widths, Activation::kSilu, gated, biased}).check();
            }
        }
    }
}

TEST_CASE("every activation gives the result of its equation") {
    using enum Activation;
    for (const Activation activation : {kSilu, kGelu, kGeluTanh, kRelu, kRelu2, kSwigluOai}) {
        for (const bool gated : {false, true}) {
            if (gated || activation != kSwigluOai) {
                CAPTURE(static_cast<int>(activation));
                CAPTURE(gated);
                Layer(with([&](Shape& shape) {
                    shape.activation = activation;
                    shape.gated = gated;
                })).check();
            }
        }
    }
}

TEST_CASE("hidden sizes need not fill a vector or a tile") {
    for (const std::int64_t hidden_size : {1, 4, 15, 16, 17, 33, 200, 530}) {
        CAPTURE(hidden_size);
        Layer(with([&](Shape& shape) { shape.hidden_size = hidden_size; })).check();
    }
}

TEST_CASE("few and many rows give the result of the equations") {
    for (const std::int64_t tokens : {0, 1, 2, 7, 50, 500}) {
        CAPTURE(tokens);
        Layer(with([&](Shape& shape) {
            shape.tokens = tokens;
            shape.widths = {20, 16};
        })).check();
    }
}

TEST_CASE("no slots, no experts and no hidden dimensions are legal") {
    Layer(with([](Shape& shape) { shape.per_token = 0; })).check();
    Layer(with([](Shape& shape) { shape.widths = {}; })).check();
    Layer(with([](Shape& shape) { shape.widths = {0, 0}; })).check();
    Layer(with([](Shape& shape) { shape.hidden_size = 0; })).check();
}

TEST_CASE("a call is worked off in chunks when it has many rows") {
    Layer(with([](Shape& shape) {
        shape.tokens = 9000;  // two chunks of 16384 rows
        shape.hidden_size = 2;
        shape.widths = {1, 2};
    })).check();
}

TEST_CASE("large negative gates give 0 and not NaN") {
    Layer layer(with([](Shape& shape) {
        shape.widths = {16};
        shape.biased = true;
    }));
    for (std::int64_t row = 0; row < 16; ++row) {
        layer.gate_up_bias.set(0, row, -1e6);
    }
    layer.down_bias.fill_row(0, 0);
    layer.check();
    CHECK(layer.out.get(0, 0) == 0);
}

TEST_CASE("the result is the same on any number of threads, bit for bit") {
    for (const DType dtype : kFloats) {
        std::vector<std::vector<double>> results;
        for (const int threads : {1, 2, 5}) {
            with_threads(threads, [&] {
                Layer layer({dtype, 300, 2, 40, {70, 16, 0, 33}});
                expert_gemm(layer.args());
                results.push_back(layer.out.values());
            });
        }
        CHECK(results[0] == results[1]);
        CHECK(results[0] == results[2]);
    }
}

TEST_CASE("a token's result does not depend on the tokens beside it, bit for bit") {
    for (const DType dtype : kFloats) {
        // 1,030 hidden dimensions: more than one block of depth, with a tail; 1,024: without.
        for (const std::int64_t hidden_size : {1030, 1024}) {
            Layer layer({dtype, 120, 1, hidden_size, {300}});
            expert_gemm(layer.args());
            const std::vector<double> together = layer.out.values();
            // Up to four rows are for vectors, which add in another order than AMX.
            const bool has_tiles = dtype == DType::kBFloat16 && std::string(cpu_isa()) == "amx";
            const std::int64_t tokens = has_tiles ? 64 : 1;
            for (const std::int64_t token : {std::int64_t{0}, std::int64_t{7}, 120 - tokens}) {
                ExpertGemmArgs args = layer.args();
                args.hidden.data =
                    static_cast<char*>(args.hidden.data) +
                    static_cast<std::size_t>(token * args.hidden.stride[0]) * dtype_size(dtype);
                args.hidden.shape[0] = tokens;
                args.expert_ids = contiguous_view(&layer.ids[token], {tokens, 1});
                args.gates = contiguous_view(&layer.gates[token], {tokens, 1});
                args.out.shape[0] = tokens;
                expert_gemm(args);
                bool same = true;
                for (std::int64_t i = 0; i < tokens * hidden_size; ++i) {
                    same &= layer.out.get(i / hidden_size, i % hidden_size) ==
                            together[static_cast<std::size_t>(token * hidden_size + i)];
                }
                CHECK(same);
            }
        }
    }
}

TEST_CASE("the workspace may begin anywhere") {
    Layer layer{Shape{}};
    expert_gemm(layer.args());
    const std::vector<double> expected = layer.out.values();
    Guarded<std::uint8_t> workspace(layer.workspace.size() + 1);
    ExpertGemmArgs args = layer.args();
    args.workspace = contiguous_view(workspace.data() + 1, {layer.workspace.size()});
    expert_gemm(args);
    CHECK(layer.out.values() == expected);
}

TEST_CASE("expert_gemm refuses what does not fit and says how") {
    Layer layer{Shape{}};
    const auto refusal_of = [&](auto change) {
        ExpertGemmArgs args = layer.args();
        change(args);
        return refusal([&] { expert_gemm(args); });
    };
    CHECK(refusal_of([](ExpertGemmArgs& args) {
              args.gated = false;
          }) == "expert_gemm: gate_up must be [80, 20], got [160, 20]");
    CHECK(refusal_of([](ExpertGemmArgs& args) {
              args.down.dtype = DType::kBFloat16;
          }) == "expert_gemm: down must be float32, got bfloat16");
    CHECK(refusal_of([](ExpertGemmArgs& args) {
              args.hidden.dtype = DType::kFloat64;
          }) == "expert_gemm: hidden must be float32, bfloat16 or float16, got float64");
    CHECK(refusal_of([](ExpertGemmArgs& args) {
              args.workspace.shape[0] -= 1;
          }).find("expert_gemm: workspace must be ") == 0);
    CHECK(refusal_of([](ExpertGemmArgs& args) {
              args.out.data = args.hidden.data;
          }) == "expert_gemm: out must be memory of its own, got an overlap with hidden");
    CHECK(
        refusal_of([](ExpertGemmArgs& args) { args.out.stride[0] = 19; }) ==
        "expert_gemm: out must be without overlapping rows, got a row stride smaller than a row"
    );
    CHECK(refusal_of([](ExpertGemmArgs& args) {
              args.activation = Activation::kSwigluOai;
              args.limit = 0;
          }).find("expert_gemm: limit must be positive for swiglu_oai, got 0") == 0);
    const Ints widths = {16, 3, 0, 49};
    CHECK(refusal_of([&](ExpertGemmArgs& args) {
              args.widths = contiguous_view(widths.data(), {4});
          }) == "expert_gemm: widths must be within 0..48 for expert 3, got 49");
    const Ints offsets = {0, 16, 32, 32, 64};
    CHECK(
        refusal_of([&](ExpertGemmArgs& args) {
            args.neuron_offsets = contiguous_view(offsets.data(), {5});
        }) == "expert_gemm: neuron_offsets must be offsets that end at the 80 rows of down, got 64"
    );
}

TEST_CASE("float16 is read and rounded as IEEE 754 has it, for every value") {
    // A layer that hands every input on: one neuron, relu, weights of 1, as many tokens as values.
    constexpr std::int64_t kValues = 1 << 16;
    std::vector<std::uint16_t> hidden(kValues), out(kValues),
        one = std::vector<std::uint16_t>(16, 0);
    for (std::int64_t bits = 0; bits < kValues; ++bits) {
        hidden[static_cast<std::size_t>(bits)] = static_cast<std::uint16_t>(bits);
    }
    one[0] = float16_bits(1);
    const Ints ids(kValues, 0), widths = {1}, offsets = {0, 16};
    const std::vector<float> gates(kValues, 1.0f);
    std::vector<std::uint8_t> workspace(
        expert_gemm_workspace_bytes(kValues, 1, 1, 1, 1, DType::kFloat16)
    );
    expert_gemm({
        .hidden = contiguous_view(hidden.data(), DType::kFloat16, {kValues, 1}),
        .expert_ids = contiguous_view(ids.data(), {kValues, 1}),
        .gates = contiguous_view(gates.data(), {kValues, 1}),
        .gate_up = contiguous_view(one.data(), DType::kFloat16, {16, 1}),
        .down = contiguous_view(one.data(), DType::kFloat16, {16, 1}),
        .widths = contiguous_view(widths.data(), {1}),
        .neuron_offsets = contiguous_view(offsets.data(), {2}),
        .activation = Activation::kRelu,
        .gated = false,
        .out = contiguous_view(out.data(), DType::kFloat16, {kValues, 1}),
        .workspace = contiguous_view(workspace.data(), {std::ssize(workspace)}),
    });
    int wrong = 0;
    for (std::int64_t bits = 0; bits < kValues; ++bits) {
        const double in = float16_value(static_cast<std::uint16_t>(bits));
        const double back = float16_value(out[static_cast<std::size_t>(bits)]);
        wrong += std::isnan(in) ? !std::isnan(back) : back != std::max(in, 0.0);
    }
    CHECK(wrong == 0);
}

TEST_CASE("int8 rows with scales that are powers of two give the bits of the same weights") {
    for (const DType dtype : kFloats) {
        for (const std::int64_t tokens : {1, 40}) {
            CAPTURE(dtype_name(dtype));
            CAPTURE(tokens);
            Layer layer(with([&](Shape& shape) {
                shape.dtype = dtype;
                shape.tokens = tokens;
                shape.hidden_size = 33;
            }));
            ExpertGemmArgs args = layer.args();
            expert_gemm(args);
            const auto expected = layer.out.values();

            // Weights are multiples of 1/32 within +-1/2; rows that must not be read are NaN.
            constexpr double kScale = 1.0 / 32;
            const auto quantize = [&](Matrix& weights, auto& q, Matrix& scale) {
                for (std::int64_t row = 0; row < q.size() / 33; ++row) {
                    for (std::int64_t h = 0; h < 33; ++h) {
                        const double value = weights.get(row, h);
                        q[row * 33 + h] =
                            static_cast<std::int8_t>(std::isnan(value) ? 127 : value / kScale);
                    }
                    scale.set(0, row, std::isnan(weights.get(row, 0)) ? kNan : kScale);
                }
            };
            const std::int64_t rows = args.down.shape[0];
            Guarded<std::int8_t> gate_up(2 * rows * 33);
            Guarded<std::int8_t> down(rows * 33);
            Matrix gate_up_scale(dtype, 1, 2 * rows);
            Matrix down_scale(dtype, 1, rows);
            quantize(layer.gate_up, gate_up, gate_up_scale);
            quantize(layer.down, down, down_scale);
            args.gate_up = gate_up.view({2 * rows, 33});
            args.down = down.view({rows, 33});
            CHECK_THROWS_AS(expert_gemm(args), InvalidArgument);
            args.gate_up_scale = gate_up_scale.view({2 * rows});
            args.down_scale = down_scale.view({rows});
            expert_gemm(args);
            CHECK(layer.out.values() == expected);
        }
    }
}

TEST_CASE("a workspace too large for any machine is refused, not wrapped around") {
    CHECK_THROWS_AS(
        expert_gemm_workspace_bytes(1, INT32_MAX, INT32_MAX, 1, INT32_MAX, DType::kFloat32),
        InvalidArgument
    );
    CHECK_THROWS_AS(expert_gemm_workspace_bytes(-1, 1, 1, 1, 1, DType::kFloat32), InvalidArgument);
    CHECK_THROWS_AS(expert_gemm_workspace_bytes(1, 1, 1, 1, 1, DType::kInt32), InvalidArgument);
}

}  // namespace tenp::test
