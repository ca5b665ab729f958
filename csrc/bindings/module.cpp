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

/// Runs an op. What the arguments borrow is given back by the caller, at the end of its statement.
template <typename Args>
void without_gil(void (*op)(const Args&, tenp::Stream), const Args& args, std::uintptr_t stream) {
    const py::gil_scoped_release release;
    op(args, reinterpret_cast<tenp::Stream>(stream));
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

/// Of `hidden`, which decides how large an op's workspace is.
tenp::DType float_dtype_of(const std::string& op, const std::string& name) {
    for (const auto dtype :
         {tenp::DType::kFloat32, tenp::DType::kBFloat16, tenp::DType::kFloat16}) {
        if (name == tenp::dtype_name(dtype)) {
            return dtype;
        }
    }
    throw tenp::InvalidArgument(op + ": hidden must be float32, bfloat16 or float16, got " + name);
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
    without_gil(
        tenp::route,
        tenp::RoutingArgs{
            .expert_ids = Borrowed(op, "expert_ids", expert_ids).view(),
            .offsets = Borrowed(op, "offsets", offsets).view(),
            .slots = Borrowed(op, "slots", slots).view(),
            .rows = Borrowed(op, "rows", rows).view(),
            .workspace = Borrowed(op, "workspace", workspace).view(),
        },
        stream
    );
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
    without_gil(
        tenp::tile_table,
        tenp::TileTableArgs{
            .offsets = Borrowed(op, "offsets", offsets).view(),
            .widths = Borrowed(op, "widths", widths).view(),
            .tiles = Borrowed(op, "tiles", tiles).view(),
            .count = Borrowed(op, "count", count).view(),
            .tile_rows = tile_rows,
            .tile_neurons = tile_neurons,
        },
        stream
    );
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
    without_gil(
        tenp::accumulate_activation_stats,
        tenp::ActivationStatsArgs{
            .outputs = Borrowed(op, "outputs", outputs).view(),
            .gates = Borrowed(op, "gates", gates).view(),
            .offsets = Borrowed(op, "offsets", offsets).view(),
            .counts = Borrowed(op, "counts", counts).view(),
            .gate_sum = Borrowed(op, "gate_sum", gate_sum).view(),
            .norm_sum = Borrowed(op, "norm_sum", norm_sum).view(),
            .gated_norm_sum = Borrowed(op, "gated_norm_sum", gated_norm_sum).view(),
            .norm_max = Borrowed(op, "norm_max", norm_max).view(),
            .workspace = Borrowed(op, "workspace", workspace).view(),
        },
        stream
    );
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
    without_gil(
        tenp::accumulate_direction_change,
        tenp::DirectionChangeArgs{
            .hidden = Borrowed(op, "hidden", hidden).view(),
            .outputs = Borrowed(op, "outputs", outputs).view(),
            .tokens = Borrowed(op, "tokens", tokens).view(),
            .gates = Borrowed(op, "gates", gates).view(),
            .offsets = Borrowed(op, "offsets", offsets).view(),
            .direction_change = Borrowed(op, "direction_change", direction_change).view(),
            .workspace = Borrowed(op, "workspace", workspace).view(),
        },
        stream
    );
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
    without_gil(
        tenp::accumulate_neuron_contribution,
        tenp::NeuronContributionArgs{
            .activations = Borrowed(op, "activations", activations).view(),
            .outputs = Borrowed(op, "outputs", outputs).view(),
            .down = Borrowed(op, "down", down).view(),
            .gates = Borrowed(op, "gates", gates).view(),
            .offsets = Borrowed(op, "offsets", offsets).view(),
            .projection = Borrowed(op, "projection", projection).view(),
            .magnitude = Borrowed(op, "magnitude", magnitude).view(),
            .energy = Borrowed(op, "energy", energy).view(),
            .peak = Borrowed(op, "peak", peak).view(),
            .workspace = Borrowed(op, "workspace", workspace).view(),
        },
        stream
    );
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
    without_gil(
        tenp::accumulate_second_moment,
        tenp::SecondMomentArgs{
            .activations = Borrowed(op, "activations", activations).view(),
            .gates = Borrowed(op, "gates", gates).view(),
            .offsets = Borrowed(op, "offsets", offsets).view(),
            .second_moment = Borrowed(op, "second_moment", second_moment).view(),
            .has_bias = has_bias,
        },
        stream
    );
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
    without_gil(
        tenp::expert_activations,
        tenp::ExpertActivationsArgs{
            .hidden = Borrowed(op, "hidden", hidden).view(),
            .offsets = Borrowed(op, "offsets", offsets).view(),
            .slots = Borrowed(op, "slots", slots).view(),
            .gate = Borrowed(op, "gate", gate).view(),
            .up = Borrowed(op, "up", up).view(),
            .gate_bias = Borrowed(op, "gate_bias", gate_bias).view(),
            .up_bias = Borrowed(op, "up_bias", up_bias).view(),
            .per_token = per_token,
            .activation = activation_of(op, activation),
            .limit = limit,
            .alpha = alpha,
            .activations = Borrowed(op, "activations", activations).view(),
            .workspace = Borrowed(op, "workspace", workspace).view(),
        },
        stream
    );
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
    without_gil(
        tenp::expert_statistics,
        tenp::ExpertStatisticsArgs{
            .hidden = Borrowed(op, "hidden", hidden).view(),
            .activations = Borrowed(op, "activations", activations).view(),
            .down = Borrowed(op, "down", down).view(),
            .down_bias = Borrowed(op, "down_bias", down_bias).view(),
            .offsets = Borrowed(op, "offsets", offsets).view(),
            .slots = Borrowed(op, "slots", slots).view(),
            .rows = Borrowed(op, "rows", rows).view(),
            .gates = Borrowed(op, "gates", gates).view(),
            .out = Borrowed(op, "out", out).view(),
            .counts = Borrowed(op, "counts", counts).view(),
            .gate_sum = Borrowed(op, "gate_sum", gate_sum).view(),
            .normalized_gate_sum = Borrowed(op, "normalized_gate_sum", normalized_gate_sum).view(),
            .norm_sum = Borrowed(op, "norm_sum", norm_sum).view(),
            .gated_norm_sum = Borrowed(op, "gated_norm_sum", gated_norm_sum).view(),
            .norm_max = Borrowed(op, "norm_max", norm_max).view(),
            .direction_change = Borrowed(op, "direction_change", direction_change).view(),
            .input_energy = Borrowed(op, "input_energy", input_energy).view(),
            .projection = Borrowed(op, "projection", projection).view(),
            .magnitude = Borrowed(op, "magnitude", magnitude).view(),
            .energy = Borrowed(op, "energy", energy).view(),
            .peak = Borrowed(op, "peak", peak).view(),
            .workspace = Borrowed(op, "workspace", workspace).view(),
        },
        stream
    );
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
    without_gil(
        tenp::expert_gemm,
        tenp::ExpertGemmArgs{
            .hidden = Borrowed(op, "hidden", hidden).view(),
            .expert_ids = Borrowed(op, "expert_ids", expert_ids).view(),
            .gates = Borrowed(op, "gates", gates).view(),
            .gate_up = Borrowed(op, "gate_up", gate_up).view(),
            .down = Borrowed(op, "down", down).view(),
            .widths = Borrowed(op, "widths", widths).view(),
            .neuron_offsets = Borrowed(op, "neuron_offsets", neuron_offsets).view(),
            .gate_up_bias = Borrowed(op, "gate_up_bias", gate_up_bias).view(),
            .down_bias = Borrowed(op, "down_bias", down_bias).view(),
            .gate_up_scale = Borrowed(op, "gate_up_scale", gate_up_scale).view(),
            .down_scale = Borrowed(op, "down_scale", down_scale).view(),
            .activation = activation_of(op, activation),
            .gated = gated,
            .limit = limit,
            .alpha = alpha,
            .max_width = max_width,
            .allow_tf32 = allow_tf32,
            .out = Borrowed(op, "out", out).view(),
            .workspace = Borrowed(op, "workspace", workspace).view(),
        },
        stream
    );
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
                rows, experts, hidden_size, neurons, float_dtype_of("expert_statistics", dtype)
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
                float_dtype_of("expert_gemm", dtype)
            );
        },
        arg("tokens"), arg("experts_per_token"), arg("hidden_size"), arg("num_experts"),
        arg("max_width"), arg("dtype")
    );
}
