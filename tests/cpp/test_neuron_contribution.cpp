// SPDX-License-Identifier: Apache-2.0
#include "support.h"

namespace tenp::test {
namespace {

/// Random m and y for rows in `experts` experts; the last two rows belong to nobody.
struct Case {
    Case(DType dtype, std::int64_t hidden_size, std::int64_t neurons, Guarded<std::int32_t>& rows)
        : offsets(rows),
          experts(rows.size() - 1),
          count(rows[experts] + 2),
          hidden_size_(hidden_size),
          neurons_(neurons),
          activations(dtype, count, neurons, 3),
          outputs(dtype, count, hidden_size, 5),
          down(dtype, experts * hidden_size, neurons),
          down_by_neuron(dtype, experts * neurons, hidden_size),
          gates(count, 0.5f),
          projection(experts * neurons),
          magnitude(experts * neurons),
          energy(experts * neurons),
          peak(experts * neurons) {
        activations.fill(1);
        outputs.fill(2);
        down.fill(3);
        for (std::int64_t row = count - 2; row < count; ++row) {
            activations.fill_row(row, kNan);
            outputs.fill_row(row, kNan);
            gates[row] = static_cast<float>(kNan);
        }
        for (std::int64_t expert = 0; expert < experts; ++expert) {
            for (std::int64_t h = 0; h < hidden_size; ++h) {
                for (std::int64_t neuron = 0; neuron < neurons; ++neuron) {
                    down_by_neuron.set(
                        expert * neurons + neuron, h, down.get(expert * hidden_size + h, neuron)
                    );
                }
            }
        }
    }

    NeuronContributionArgs args(bool by_neuron = false) {
        TensorView weights = down.view({experts, hidden_size_, neurons_});
        if (by_neuron) {
            weights = down_by_neuron.view({experts, neurons_, hidden_size_});
            std::swap(weights.shape[1], weights.shape[2]);
            std::swap(weights.stride[1], weights.stride[2]);
        }
        return {
            .activations = activations.view(),
            .outputs = outputs.view(),
            .down = weights,
            .gates = gates.view(),
            .offsets = offsets.view(),
            .projection = projection.view({experts, neurons_}),
            .magnitude = magnitude.view({experts, neurons_}),
            .energy = energy.view({experts, neurons_}),
            .peak = peak.view({experts, neurons_}),
        };
    }

    /// The projection of one neuron by its equation.
    double expected_projection(std::int64_t expert, std::int64_t neuron) {
        double sum = 0;
        for (std::int64_t row = offsets[expert]; row < offsets[expert + 1]; ++row) {
            double along = 0;
            double squares = 0;
            for (std::int64_t h = 0; h < hidden_size_; ++h) {
                const double y = outputs.get(row, h);
                along += down.get(expert * hidden_size_ + h, neuron) * y;
                squares += y * y;
            }
            if (squares > 0) {
                sum += activations.get(row, neuron) * along / std::sqrt(squares);
            }
        }
        return sum;
    }

    Guarded<std::int32_t>& offsets;
    std::int64_t experts;
    std::int64_t count;
    std::int64_t hidden_size_;
    std::int64_t neurons_;
    Matrix activations;
    Matrix outputs;
    Matrix down;
    Matrix down_by_neuron;
    Guarded<float> gates;
    Guarded<double> projection;
    Guarded<double> magnitude;
    Guarded<double> energy;
    Guarded<double> peak;
};

}  // namespace

TEST_CASE("both layouts of the weights give the projection of the equation") {
    // Tails of every tile: rows, neurons and hidden dimensions.
    const std::int64_t sizes[][2] = {{1, 1}, {7, 17}, {16, 32}, {33, 130}, {70, 5}};
    for (const DType dtype : kFloats) {
        for (const auto& size : sizes) {
            const std::int64_t hidden_size = size[0];
            const std::int64_t neurons = size[1];
            for (const bool by_neuron : {false, true}) {
                CAPTURE(dtype_name(dtype));
                CAPTURE(hidden_size);
                CAPTURE(neurons);
                CAPTURE(by_neuron);
                Guarded<std::int32_t> offsets{0, 1, 1, 15};
                Case c(dtype, hidden_size, neurons, offsets);
                c.outputs.fill_row(3, 0);
                accumulate_neuron_contribution(c.args(by_neuron));
                for (std::int64_t expert = 0; expert < c.experts; ++expert) {
                    for (std::int64_t neuron = 0; neuron < neurons; ++neuron) {
                        const double expected = c.expected_projection(expert, neuron);
                        CHECK(
                            std::abs(c.projection[expert * neurons + neuron] - expected) <=
                            1e-5 * (1 + std::abs(expected))
                        );
                    }
                }
            }
        }
    }
}

TEST_CASE("magnitude, energy and peak are exact and added to what is there") {
    Guarded<std::int32_t> offsets{0, 0, 3};
    Case c(DType::kBFloat16, 4, 3, offsets);
    for (int row = 0; row < 3; ++row) {
        c.activations.set(row, 1, row - 2);  // -2, -1, 0
    }
    for (Guarded<double>* sums : {&c.projection, &c.magnitude, &c.energy, &c.peak}) {
        for (std::int64_t i = 0; i < sums->size(); ++i) {
            (*sums)[i] = 0.25;
        }
    }
    accumulate_neuron_contribution(c.args());
    CHECK(c.magnitude[3 + 1] == 0.25 + 3);
    CHECK(c.energy[3 + 1] == 0.25 + 1 + 0.25);
    CHECK(c.peak[3 + 1] == 1);
    CHECK(c.magnitude[1] == 0.25);  // expert 0 has no rows
    CHECK(c.peak[1] == 0.25);
}

TEST_CASE("NaN in an activation reaches its neuron and no other") {
    Guarded<std::int32_t> offsets{0, 3};
    Case c(DType::kFloat32, 8, 4, offsets);
    c.activations.set(1, 2, kNan);
    accumulate_neuron_contribution(c.args());
    for (std::int64_t neuron = 0; neuron < 4; ++neuron) {
        CHECK(std::isnan(c.projection[neuron]) == (neuron == 2));
        CHECK(std::isnan(c.peak[neuron]) == (neuron == 2));
    }
}

TEST_CASE("many rows give the same sums on any number of threads") {
    Guarded<std::int32_t> offsets{0, 500, 900};
    std::vector<std::vector<double>> results;
    for (const int threads : {1, 2, 5}) {
        with_threads(threads, [&] {
            Case c(DType::kFloat16, 40, 150, offsets);
            accumulate_neuron_contribution(c.args());
            results.push_back(c.projection.values());
        });
    }
    CHECK(results[0] == results[1]);
    CHECK(results[0] == results[2]);
}

TEST_CASE("weights that are contiguous along neither dimension are refused") {
    Guarded<std::int32_t> offsets{0, 1};
    Case c(DType::kFloat32, 4, 3, offsets);
    NeuronContributionArgs args = c.args();
    args.down.stride = {24, 6, 2};
    CHECK(
        refusal([&] { accumulate_neuron_contribution(args); }) ==
        "accumulate_neuron_contribution: down must be contiguous along its second or third "
        "dimension, got strides [24, 6, 2]"
    );
}

TEST_CASE("no experts, no neurons and no hidden dimensions are legal") {
    Guarded<std::int32_t> none{0};
    Case no_experts(DType::kFloat32, 4, 3, none);
    accumulate_neuron_contribution(no_experts.args());
    Guarded<std::int32_t> offsets{0, 2};
    Case no_neurons(DType::kFloat32, 4, 0, offsets);
    accumulate_neuron_contribution(no_neurons.args());
    Case no_hidden(DType::kFloat32, 0, 3, offsets);
    accumulate_neuron_contribution(no_hidden.args());
    CHECK(no_hidden.projection.values() == std::vector<double>(3));
}

}  // namespace tenp::test
