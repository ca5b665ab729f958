// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "bindings/borrow.h"
#include "tenp/tenp.h"

// tenp._C: the C++ API with arrays borrowed through DLPack. It knows no framework; tenp/ops is what
// gives these functions to PyTorch.

namespace py = pybind11;
using py::arg;
using tenp::bindings::Borrowed;

namespace {

tenp::Stream as_stream(std::uintptr_t stream) {
    return reinterpret_cast<tenp::Stream>(stream);
}

tenp::Activation activation_of(const std::string& op, const std::string& name) {
    using enum tenp::Activation;
    static const std::pair<const char*, tenp::Activation> kNames[] = {
        {"silu", kSilu}, {"gelu", kGelu},   {"gelu_tanh", kGeluTanh},
        {"relu", kRelu}, {"relu2", kRelu2}, {"swiglu_oai", kSwigluOai},
    };
    std::string known;
    for (const auto& [known_name, activation] : kNames) {
        if (name == known_name) {
            return activation;
        }
        known.append(known.empty() ? "" : ", ").append(known_name);
    }
    throw tenp::InvalidArgument(
        op + ": activation must be one of " + known + ", got '" + name + "'"
    );
}

tenp::DType float_dtype_of(const std::string& op, const std::string& name) {
    for (const auto dtype :
         {tenp::DType::kFloat32, tenp::DType::kBFloat16, tenp::DType::kFloat16}) {
        if (name == tenp::dtype_name(dtype)) {
            return dtype;
        }
    }
    throw tenp::InvalidArgument(
        op + ": dtype must be float32, bfloat16 or float16, got '" + name + "'"
    );
}

// ---- one function per op ----------------------------------------------------------------------

void route(
    const py::object& expert_ids,
    const py::object& offsets,
    const py::object& slots,
    const py::object& rows,
    const py::object& workspace,
    std::uintptr_t stream
) {
    const char* op = "route";
    const Borrowed ids(op, "expert_ids", expert_ids);
    const Borrowed offsets_(op, "offsets", offsets);
    const Borrowed slots_(op, "slots", slots);
    const Borrowed rows_(op, "rows", rows);
    const Borrowed workspace_(op, "workspace", workspace);
    const tenp::RoutingArgs args{
        .expert_ids = ids.view(),
        .offsets = offsets_.view(),
        .slots = slots_.view(),
        .rows = rows_.view(),
        .workspace = workspace_.view(),
    };
    const py::gil_scoped_release release;
    tenp::route(args, as_stream(stream));
}

void tile_table(
    const py::object& offsets,
    const py::object& widths,
    const py::object& tiles,
    const py::object& count,
    std::int32_t tile_rows,
    std::int32_t tile_neurons,
    std::uintptr_t stream
) {
    const char* op = "tile_table";
    const Borrowed offsets_(op, "offsets", offsets);
    const Borrowed widths_(op, "widths", widths);
    const Borrowed tiles_(op, "tiles", tiles);
    const Borrowed count_(op, "count", count);
    const tenp::TileTableArgs args{
        .offsets = offsets_.view(),
        .widths = widths_.view(),
        .tiles = tiles_.view(),
        .count = count_.view(),
        .tile_rows = tile_rows,
        .tile_neurons = tile_neurons,
    };
    const py::gil_scoped_release release;
    tenp::tile_table(args, as_stream(stream));
}

void accumulate_activation_stats(
    const py::object& outputs,
    const py::object& gates,
    const py::object& offsets,
    const py::object& counts,
    const py::object& gate_sum,
    const py::object& norm_sum,
    const py::object& gated_norm_sum,
    const py::object& norm_max,
    const py::object& workspace,
    std::uintptr_t stream
) {
    const char* op = "accumulate_activation_stats";
    const Borrowed outputs_(op, "outputs", outputs);
    const Borrowed gates_(op, "gates", gates);
    const Borrowed offsets_(op, "offsets", offsets);
    const Borrowed counts_(op, "counts", counts);
    const Borrowed gate_sum_(op, "gate_sum", gate_sum);
    const Borrowed norm_sum_(op, "norm_sum", norm_sum);
    const Borrowed gated_norm_sum_(op, "gated_norm_sum", gated_norm_sum);
    const Borrowed norm_max_(op, "norm_max", norm_max);
    const Borrowed workspace_(op, "workspace", workspace);
    const tenp::ActivationStatsArgs args{
        .outputs = outputs_.view(),
        .gates = gates_.view(),
        .offsets = offsets_.view(),
        .counts = counts_.view(),
        .gate_sum = gate_sum_.view(),
        .norm_sum = norm_sum_.view(),
        .gated_norm_sum = gated_norm_sum_.view(),
        .norm_max = norm_max_.view(),
        .workspace = workspace_.view(),
    };
    const py::gil_scoped_release release;
    tenp::accumulate_activation_stats(args, as_stream(stream));
}

void accumulate_direction_change(
    const py::object& hidden,
    const py::object& outputs,
    const py::object& tokens,
    const py::object& gates,
    const py::object& offsets,
    const py::object& direction_change,
    const py::object& workspace,
    std::uintptr_t stream
) {
    const char* op = "accumulate_direction_change";
    const Borrowed hidden_(op, "hidden", hidden);
    const Borrowed outputs_(op, "outputs", outputs);
    const Borrowed tokens_(op, "tokens", tokens);
    const Borrowed gates_(op, "gates", gates);
    const Borrowed offsets_(op, "offsets", offsets);
    const Borrowed direction_change_(op, "direction_change", direction_change);
    const Borrowed workspace_(op, "workspace", workspace);
    const tenp::DirectionChangeArgs args{
        .hidden = hidden_.view(),
        .outputs = outputs_.view(),
        .tokens = tokens_.view(),
        .gates = gates_.view(),
        .offsets = offsets_.view(),
        .direction_change = direction_change_.view(),
        .workspace = workspace_.view(),
    };
    const py::gil_scoped_release release;
    tenp::accumulate_direction_change(args, as_stream(stream));
}

void accumulate_neuron_contribution(
    const py::object& activations,
    const py::object& outputs,
    const py::object& down,
    const py::object& gates,
    const py::object& offsets,
    const py::object& projection,
    const py::object& magnitude,
    const py::object& energy,
    const py::object& peak,
    const py::object& workspace,
    std::uintptr_t stream
) {
    const char* op = "accumulate_neuron_contribution";
    const Borrowed activations_(op, "activations", activations);
    const Borrowed outputs_(op, "outputs", outputs);
    const Borrowed down_(op, "down", down);
    const Borrowed gates_(op, "gates", gates);
    const Borrowed offsets_(op, "offsets", offsets);
    const Borrowed projection_(op, "projection", projection);
    const Borrowed magnitude_(op, "magnitude", magnitude);
    const Borrowed energy_(op, "energy", energy);
    const Borrowed peak_(op, "peak", peak);
    const Borrowed workspace_(op, "workspace", workspace);
    const tenp::NeuronContributionArgs args{
        .activations = activations_.view(),
        .outputs = outputs_.view(),
        .down = down_.view(),
        .gates = gates_.view(),
        .offsets = offsets_.view(),
        .projection = projection_.view(),
        .magnitude = magnitude_.view(),
        .energy = energy_.view(),
        .peak = peak_.view(),
        .workspace = workspace_.view(),
    };
    const py::gil_scoped_release release;
    tenp::accumulate_neuron_contribution(args, as_stream(stream));
}

void accumulate_second_moment(
    const py::object& activations,
    const py::object& gates,
    const py::object& offsets,
    const py::object& second_moment,
    bool has_bias,
    std::uintptr_t stream
) {
    const char* op = "accumulate_second_moment";
    const Borrowed activations_(op, "activations", activations);
    const Borrowed gates_(op, "gates", gates);
    const Borrowed offsets_(op, "offsets", offsets);
    const Borrowed second_moment_(op, "second_moment", second_moment);
    const tenp::SecondMomentArgs args{
        .activations = activations_.view(),
        .gates = gates_.view(),
        .offsets = offsets_.view(),
        .second_moment = second_moment_.view(),
        .has_bias = has_bias,
    };
    const py::gil_scoped_release release;
    tenp::accumulate_second_moment(args, as_stream(stream));
}

void expert_activations(
    const py::object& hidden,
    const py::object& offsets,
    const py::object& slots,
    const py::object& gate,
    const py::object& up,
    const py::object& gate_bias,
    const py::object& up_bias,
    const py::object& activations,
    std::int32_t per_token,
    const std::string& activation,
    float limit,
    float alpha,
    const py::object& workspace,
    std::uintptr_t stream
) {
    const char* op = "expert_activations";
    const Borrowed hidden_(op, "hidden", hidden);
    const Borrowed offsets_(op, "offsets", offsets);
    const Borrowed slots_(op, "slots", slots);
    const Borrowed gate_(op, "gate", gate);
    const Borrowed up_(op, "up", up);
    const Borrowed gate_bias_(op, "gate_bias", gate_bias);
    const Borrowed up_bias_(op, "up_bias", up_bias);
    const Borrowed activations_(op, "activations", activations);
    const Borrowed workspace_(op, "workspace", workspace);
    const tenp::ExpertActivationsArgs args{
        .hidden = hidden_.view(),
        .offsets = offsets_.view(),
        .slots = slots_.view(),
        .gate = gate_.view(),
        .up = up_.view(),
        .gate_bias = gate_bias_.view(),
        .up_bias = up_bias_.view(),
        .per_token = per_token,
        .activation = activation_of(op, activation),
        .limit = limit,
        .alpha = alpha,
        .activations = activations_.view(),
        .workspace = workspace_.view(),
    };
    const py::gil_scoped_release release;
    tenp::expert_activations(args, as_stream(stream));
}

void expert_statistics(
    const py::object& hidden,
    const py::object& activations,
    const py::object& down,
    const py::object& down_bias,
    const py::object& offsets,
    const py::object& slots,
    const py::object& rows,
    const py::object& gates,
    const py::object& out,
    const py::object& counts,
    const py::object& gate_sum,
    const py::object& normalized_gate_sum,
    const py::object& norm_sum,
    const py::object& gated_norm_sum,
    const py::object& norm_max,
    const py::object& direction_change,
    const py::object& input_energy,
    const py::object& projection,
    const py::object& magnitude,
    const py::object& energy,
    const py::object& peak,
    const py::object& workspace,
    std::uintptr_t stream
) {
    const char* op = "expert_statistics";
    const Borrowed hidden_(op, "hidden", hidden);
    const Borrowed activations_(op, "activations", activations);
    const Borrowed down_(op, "down", down);
    const Borrowed down_bias_(op, "down_bias", down_bias);
    const Borrowed offsets_(op, "offsets", offsets);
    const Borrowed slots_(op, "slots", slots);
    const Borrowed rows_(op, "rows", rows);
    const Borrowed gates_(op, "gates", gates);
    const Borrowed out_(op, "out", out);
    const Borrowed counts_(op, "counts", counts);
    const Borrowed gate_sum_(op, "gate_sum", gate_sum);
    const Borrowed normalized_gate_sum_(op, "normalized_gate_sum", normalized_gate_sum);
    const Borrowed norm_sum_(op, "norm_sum", norm_sum);
    const Borrowed gated_norm_sum_(op, "gated_norm_sum", gated_norm_sum);
    const Borrowed norm_max_(op, "norm_max", norm_max);
    const Borrowed direction_change_(op, "direction_change", direction_change);
    const Borrowed input_energy_(op, "input_energy", input_energy);
    const Borrowed projection_(op, "projection", projection);
    const Borrowed magnitude_(op, "magnitude", magnitude);
    const Borrowed energy_(op, "energy", energy);
    const Borrowed peak_(op, "peak", peak);
    const Borrowed workspace_(op, "workspace", workspace);
    const tenp::ExpertStatisticsArgs args{
        .hidden = hidden_.view(),
        .activations = activations_.view(),
        .down = down_.view(),
        .down_bias = down_bias_.view(),
        .offsets = offsets_.view(),
        .slots = slots_.view(),
        .rows = rows_.view(),
        .gates = gates_.view(),
        .out = out_.view(),
        .counts = counts_.view(),
        .gate_sum = gate_sum_.view(),
        .normalized_gate_sum = normalized_gate_sum_.view(),
        .norm_sum = norm_sum_.view(),
        .gated_norm_sum = gated_norm_sum_.view(),
        .norm_max = norm_max_.view(),
        .direction_change = direction_change_.view(),
        .input_energy = input_energy_.view(),
        .projection = projection_.view(),
        .magnitude = magnitude_.view(),
        .energy = energy_.view(),
        .peak = peak_.view(),
        .workspace = workspace_.view(),
    };
    const py::gil_scoped_release release;
    tenp::expert_statistics(args, as_stream(stream));
}

void expert_gemm(
    const py::object& hidden,
    const py::object& expert_ids,
    const py::object& gates,
    const py::object& gate_up,
    const py::object& down,
    const py::object& widths,
    const py::object& neuron_offsets,
    const py::object& gate_up_bias,
    const py::object& down_bias,
    const py::object& gate_up_scale,
    const py::object& down_scale,
    const py::object& out,
    const py::object& workspace,
    const std::string& activation,
    bool gated,
    float limit,
    float alpha,
    std::int64_t max_width,
    bool allow_tf32,
    std::uintptr_t stream
) {
    const char* op = "expert_gemm";
    const Borrowed hidden_(op, "hidden", hidden);
    const Borrowed expert_ids_(op, "expert_ids", expert_ids);
    const Borrowed gates_(op, "gates", gates);
    const Borrowed gate_up_(op, "gate_up", gate_up);
    const Borrowed down_(op, "down", down);
    const Borrowed widths_(op, "widths", widths);
    const Borrowed neuron_offsets_(op, "neuron_offsets", neuron_offsets);
    const Borrowed gate_up_bias_(op, "gate_up_bias", gate_up_bias);
    const Borrowed down_bias_(op, "down_bias", down_bias);
    const Borrowed gate_up_scale_(op, "gate_up_scale", gate_up_scale);
    const Borrowed down_scale_(op, "down_scale", down_scale);
    const Borrowed out_(op, "out", out);
    const Borrowed workspace_(op, "workspace", workspace);
    const tenp::ExpertGemmArgs args{
        .hidden = hidden_.view(),
        .expert_ids = expert_ids_.view(),
        .gates = gates_.view(),
        .gate_up = gate_up_.view(),
        .down = down_.view(),
        .widths = widths_.view(),
        .neuron_offsets = neuron_offsets_.view(),
        .gate_up_bias = gate_up_bias_.view(),
        .down_bias = down_bias_.view(),
        .gate_up_scale = gate_up_scale_.view(),
        .down_scale = down_scale_.view(),
        .activation = activation_of(op, activation),
        .gated = gated,
        .limit = limit,
        .alpha = alpha,
        .max_width = max_width,
        .allow_tf32 = allow_tf32,
        .out = out_.view(),
        .workspace = workspace_.view(),
    };
    const py::gil_scoped_release release;
    tenp::expert_gemm(args, as_stream(stream));
}

// ---- errors -----------------------------------------------------------------------------------

/// Raises the Python class of the same name: there is one tree of errors, tenp.errors.
void translate_error(std::exception_ptr error) {
    const auto raise = [](const char* name, const char* message) {
        py::set_error(py::module_::import("tenp.errors").attr(name), message);
    };
    try {
        std::rethrow_exception(std::move(error));
    } catch (const tenp::InvalidArgument& e) {
        raise("InvalidArgument", e.what());
    } catch (const tenp::Unsupported& e) {
        raise("Unsupported", e.what());
    } catch (const tenp::DeviceError& e) {
        raise("DeviceError", e.what());
    } catch (const tenp::Error& e) {
        raise("TenpError", e.what());
    }
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    m.doc() = "The C++ API of tenp; arrays are borrowed through DLPack.";
    py::register_local_exception_translator([](std::exception_ptr error) {
        if (error != nullptr) {
            translate_error(std::move(error));
        }
    });

    m.def("version", &tenp::version);
    m.def("cuda_is_available", &tenp::cuda_is_available);
    m.def("cuda_unavailable_reason", &tenp::cuda_unavailable_reason);
    m.def("cpu_isa", &tenp::cpu_isa);
    m.def("num_threads", &tenp::num_threads);
    m.def("set_num_threads", &tenp::set_num_threads, arg("threads"));

    m.def(
        "route", &route, arg("expert_ids"), arg("offsets"), arg("slots"), arg("rows"),
        arg("workspace") = py::none(), arg("stream") = 0
    );
    m.def(
        "tile_table", &tile_table, arg("offsets"), arg("widths"), arg("tiles"), arg("count"),
        arg("tile_rows"), arg("tile_neurons"), arg("stream") = 0
    );
    m.def(
        "tile_capacity", &tenp::tile_capacity, arg("rows"), arg("experts"), arg("max_width"),
        arg("tile_rows"), arg("tile_neurons")
    );
    m.def(
        "accumulate_activation_stats", &accumulate_activation_stats, arg("outputs"), arg("gates"),
        arg("offsets"), arg("counts"), arg("gate_sum"), arg("norm_sum"), arg("gated_norm_sum"),
        arg("norm_max"), arg("workspace") = py::none(), arg("stream") = 0
    );
    m.def(
        "accumulate_direction_change", &accumulate_direction_change, arg("hidden"), arg("outputs"),
        arg("tokens"), arg("gates"), arg("offsets"), arg("direction_change"),
        arg("workspace") = py::none(), arg("stream") = 0
    );
    m.def(
        "accumulate_neuron_contribution", &accumulate_neuron_contribution, arg("activations"),
        arg("outputs"), arg("down"), arg("gates"), arg("offsets"), arg("projection"),
        arg("magnitude"), arg("energy"), arg("peak"), arg("workspace") = py::none(),
        arg("stream") = 0
    );
    m.def(
        "accumulate_second_moment", &accumulate_second_moment, arg("activations"), arg("gates"),
        arg("offsets"), arg("second_moment"), arg("has_bias"), arg("stream") = 0
    );
    m.def(
        "expert_activations", &expert_activations, arg("hidden"), arg("offsets"), arg("slots"),
        arg("gate"), arg("up"), arg("gate_bias"), arg("up_bias"), arg("activations"),
        arg("per_token"), arg("activation"), arg("limit"), arg("alpha"),
        arg("workspace") = py::none(), arg("stream") = 0
    );
    m.def(
        "expert_statistics", &expert_statistics, arg("hidden"), arg("activations"), arg("down"),
        arg("down_bias"), arg("offsets"), arg("slots"), arg("rows"), arg("gates"), arg("out"),
        arg("counts"), arg("gate_sum"), arg("normalized_gate_sum"), arg("norm_sum"),
        arg("gated_norm_sum"), arg("norm_max"), arg("direction_change"), arg("input_energy"),
        arg("projection"), arg("magnitude"), arg("energy"), arg("peak"), arg("workspace"),
        arg("stream") = 0
    );
    m.def(
        "expert_activations_workspace_bytes", &tenp::expert_activations_workspace_bytes,
        arg("rows"), arg("experts"), arg("neurons")
    );
    m.def(
        "expert_statistics_workspace_bytes",
        [](std::int64_t rows, std::int64_t experts, std::int64_t hidden_size, std::int64_t neurons,
           const std::string& dtype) {
            return tenp::expert_statistics_workspace_bytes(
                rows, experts, hidden_size, neurons,
                float_dtype_of("expert_statistics_workspace_bytes", dtype)
            );
        },
        arg("rows"), arg("experts"), arg("hidden_size"), arg("neurons"), arg("dtype")
    );
    m.def("route_workspace_bytes", &tenp::route_workspace_bytes, arg("slots"), arg("experts"));
    m.def(
        "activation_stats_workspace_bytes", &tenp::activation_stats_workspace_bytes, arg("rows"),
        arg("experts")
    );
    m.def(
        "direction_change_workspace_bytes", &tenp::direction_change_workspace_bytes, arg("rows"),
        arg("experts")
    );
    m.def(
        "neuron_contribution_workspace_bytes", &tenp::neuron_contribution_workspace_bytes,
        arg("rows"), arg("experts"), arg("neurons")
    );
    m.def(
        "expert_layout",
        [](const std::vector<std::int32_t>& widths) {
            const tenp::ExpertLayout layout(widths);
            return std::vector<std::int32_t>(layout.offsets().begin(), layout.offsets().end());
        },
        arg("widths")
    );
    m.def(
        "expert_gemm", &expert_gemm, arg("hidden"), arg("expert_ids"), arg("gates"), arg("gate_up"),
        arg("down"), arg("widths"), arg("neuron_offsets"), arg("gate_up_bias"), arg("down_bias"),
        arg("gate_up_scale"), arg("down_scale"), arg("out"), arg("workspace"), arg("activation"),
        arg("gated"), arg("limit"), arg("alpha"), arg("max_width") = -1, arg("allow_tf32") = false,
        arg("stream") = 0
    );
    m.def(
        "expert_gemm_workspace_bytes",
        [](std::int64_t tokens, std::int64_t experts_per_token, std::int64_t hidden_size,
           std::int64_t num_experts, std::int64_t max_width, const std::string& dtype) {
            return tenp::expert_gemm_workspace_bytes(
                tokens, experts_per_token, hidden_size, num_experts, max_width,
                float_dtype_of("expert_gemm_workspace_bytes", dtype)
            );
        },
        arg("tokens"), arg("experts_per_token"), arg("hidden_size"), arg("num_experts"),
        arg("max_width"), arg("dtype")
    );
}
