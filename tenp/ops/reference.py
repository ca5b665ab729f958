# SPDX-License-Identifier: Apache-2.0
"""Every op as its equation, in float64 torch on the CPU: what the other modules are tested against.

Same names, arguments and results as the ops. Slow on purpose: nothing here is blocked, fused or
reordered. Arguments are documented at the ops; the equations are those of TENP (He, Zhu, Xiong,
Findings of ACL 2026, arXiv 2606.09885).
"""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from tenp.ops.routing import Routing


def route(expert_ids: Tensor, num_experts: int) -> Routing:
    """Order the (token, expert) pairs by expert, then token, then slot."""
    ids = expert_ids.flatten().tolist()
    named = [slot for slot, expert in enumerate(ids) if 0 <= expert < num_experts]
    ordered = sorted(named, key=lambda slot: (ids[slot], slot))

    offsets = [sum(ids[slot] < expert for slot in ordered) for expert in range(num_experts + 1)]
    slots = ordered + [-1] * (len(ids) - len(ordered))
    rows = [-1] * len(ids)
    for row, slot in enumerate(ordered):
        rows[slot] = row
    return Routing(
        torch.tensor(offsets, dtype=torch.int32),
        torch.tensor(slots, dtype=torch.int32),
        torch.tensor(rows, dtype=torch.int32).reshape(expert_ids.shape),
    )


def tile_table(
    offsets: Tensor,
    widths: Tensor,
    tile_rows: int,
    tile_neurons: int,
    *,
    rows: int | None = None,
    max_width: int | None = None,
) -> Tensor:
    """Cut every expert's rows x neurons rectangle into tiles; no unused entries at the end."""
    tiles = []
    by_descending_width = sorted(range(len(widths)), key=lambda expert: -int(widths[expert]))
    for expert in by_descending_width:
        begin, end = int(offsets[expert]), int(offsets[expert + 1])
        for first_neuron in range(0, int(widths[expert]), tile_neurons):
            for first_row in range(begin, end, tile_rows):
                num_rows = min(tile_rows, end - first_row)
                tiles.append((expert, first_row, num_rows, first_neuron))
    return torch.tensor(tiles, dtype=torch.int32).reshape(-1, 4)


def accumulate_activation_stats(
    outputs: Tensor,
    gates: Tensor,
    offsets: Tensor,
    *,
    counts: Tensor,
    gate_sum: Tensor,
    norm_sum: Tensor,
    gated_norm_sum: Tensor,
    norm_max: Tensor,
) -> None:
    """Add n = sum 1, sum g, sum |y| and sum g |y|, and raise max |y|."""
    for expert, rows in _rows_of_experts(offsets):
        g = gates[rows].double()  # [M]
        y = outputs[rows].double()  # [M, H]
        norm = y.norm(dim=1)
        counts[expert] += len(norm)
        gate_sum[expert] += g.sum()
        norm_sum[expert] += norm.sum()
        gated_norm_sum[expert] += (g * norm).sum()
        norm_max[expert] = max([norm_max[expert], *norm])


def accumulate_direction_change(
    hidden: Tensor,
    outputs: Tensor,
    tokens: Tensor,
    gates: Tensor,
    offsets: Tensor,
    *,
    direction_change: Tensor,
) -> None:
    """TENP, expert importance: I_e = sum_t g_t |y_t| (1 - cos(x_t, y_t))."""
    for expert, rows in _rows_of_experts(offsets):
        g = gates[rows].double()  # [M]
        x = hidden[tokens[rows].long()].double()  # [M, H]
        y = outputs[rows].double()  # [M, H]
        norms = x.norm(dim=1) * y.norm(dim=1)
        cosine = torch.where(norms > 0, (x * y).sum(dim=1) / norms, 0)
        direction_change[expert] += (g * y.norm(dim=1) * (1 - cosine)).sum()


def accumulate_neuron_contribution(
    activations: Tensor,
    outputs: Tensor,
    down: Tensor,
    gates: Tensor,
    offsets: Tensor,
    *,
    projection: Tensor,
    magnitude: Tensor,
    energy: Tensor,
    peak: Tensor,
) -> None:
    """TENP, neuron importance: n_e P_k = sum_t m_tk <w_k, y_t> / |y_t|; and three rivals' sums."""
    for expert, rows in _rows_of_experts(offsets):
        g = gates[rows].double()[:, None]  # [M, 1]
        m = activations[rows].double()  # [M, I]
        y = outputs[rows].double()  # [M, H]
        w = down[expert].double()  # [H, I]
        norm = y.norm(dim=1, keepdim=True)
        direction = torch.where(norm > 0, y / norm, 0)
        projection[expert] += (m * (direction @ w)).sum(dim=0)
        magnitude[expert] += m.abs().sum(dim=0)
        energy[expert] += (g * m).square().sum(dim=0)
        peak[expert] = torch.cat([(g * m).abs(), peak[expert, None]]).amax(dim=0)


def accumulate_second_moment(
    activations: Tensor,
    gates: Tensor,
    offsets: Tensor,
    *,
    second_moment: Tensor,
    has_bias: bool = False,
) -> None:
    """C = sum_t g_t^2 m_t m_t^T, its upper triangle row by row; with a bias, m ends with a 1."""
    for expert, rows in _rows_of_experts(offsets):
        g = gates[rows].double()[:, None]  # [M, 1]
        m = activations[rows].double()  # [M, I]
        if has_bias:
            m = torch.cat([m, torch.ones_like(g)], dim=1)
        c = (g * m).T @ (g * m)
        row, column = torch.triu_indices(*c.shape)
        second_moment[expert] += c[row, column]


def expert_activations(
    hidden: Tensor,
    offsets: Tensor,
    slots: Tensor,
    gate: Tensor | None,
    up: Tensor,
    experts_per_token: int,
    *,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "silu",
    limit: float = 0.0,
    alpha: float = 0.0,
) -> Tensor:
    """Of every row m = act(W_g x + b_g) * (W_u x + b_u) or act(W_u x + b_u), in float64."""
    m = torch.full((len(slots), up.shape[1]), torch.nan, dtype=torch.float64)
    for expert, rows in _rows_of_experts(offsets):
        x = hidden[slots[rows].long() // experts_per_token].double()  # [M, H]

        def project(weight: Tensor, bias: Tensor | None) -> Tensor:
            projected = x @ weight[expert].double().T  # noqa: B023
            return projected if bias is None else projected + bias[expert].double()  # noqa: B023

        projected_gate = None if gate is None else project(gate, gate_bias)
        m[rows] = activate(projected_gate, project(up, up_bias), activation, limit, alpha)
    return m


def expert_statistics(
    hidden: Tensor,
    activations: Tensor,
    down: Tensor,
    offsets: Tensor,
    slots: Tensor,
    rows: Tensor,
    gates: Tensor,
    *,
    down_bias: Tensor | None = None,
    out: Tensor,
    normalized_gate_sum: Tensor,
    input_energy: Tensor,
    **sums: Tensor,
) -> None:
    """out_t = sum_j g_tj (y + b_d) for y = W_d m, and all sums over the rows of an expert."""
    experts_per_token = rows.shape[1]
    tokens = slots // experts_per_token
    g = gates.flatten()[slots.long()]
    y = torch.full((len(slots), hidden.shape[1]), torch.nan, dtype=hidden.dtype)
    for expert, mine in _rows_of_experts(offsets):
        # Rounded, as the op promises to do: the statistics are those of what the model goes on with.
        y[mine] = (activations[mine].double() @ down[expert].double().T).to(hidden.dtype)
        with_bias = y[mine].double()
        if down_bias is not None:
            with_bias = with_bias + down_bias[expert].double()
        token = tokens[mine].long()
        out.index_add_(0, token, (g[mine, None].double() * with_bias).to(out.dtype))
        totals = gates.double().sum(dim=1)[token]
        normalized_gate_sum[expert] += (g[mine] / torch.where(totals > 0, totals, 1)).sum()
        input_energy[expert] += (g[mine, None].double() * hidden[token].double()).square().sum(0)

    def of(*names: str) -> dict[str, Tensor]:
        return {name: sums[name] for name in names}

    accumulate_activation_stats(
        y, g, offsets, **of("counts", "gate_sum", "norm_sum", "gated_norm_sum", "norm_max")
    )
    accumulate_direction_change(hidden, y, tokens, g, offsets, **of("direction_change"))
    accumulate_neuron_contribution(
        activations,
        y,
        down,
        g,
        offsets,
        **of("projection", "magnitude", "energy", "peak"),
    )


def expert_gemm(
    hidden: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    gate_up: Tensor,
    down: Tensor,
    widths: Tensor,
    neuron_offsets: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    limit: float = 0.0,
    alpha: float = 0.0,
    max_width: int | None = None,
    allow_tf32: bool = False,
) -> Tensor:
    """out_t = sum_j g_tj (W_d m + b_d), m = act(W_g x + b_g) * (W_u x + b_u) or act(W_u x + b_u).

    Returns float64. m is rounded to the dtype of `hidden`, as the op promises to do; hand in
    float64 tensors for the bare equation. Rows of int8 weights are multiplied by their scales first.
    """
    if gate_up_scale is not None and down_scale is not None:
        gate_up = gate_up.double() * gate_up_scale.double()[:, None]
        down = down.double() * down_scale.double()[:, None]
    out = torch.zeros(hidden.shape, dtype=torch.float64)
    num_rows = down.shape[0]
    first_up_row = num_rows if gated else 0
    for expert in range(len(widths)):
        token, slot = (expert_ids == expert).nonzero(as_tuple=True)
        begin = int(neuron_offsets[expert])
        gate_rows = slice(begin, begin + int(widths[expert]))
        up_rows = slice(first_up_row + gate_rows.start, first_up_row + gate_rows.stop)

        x = hidden[token].double()  # [M, H]
        gate = _linear(x, gate_up, gate_up_bias, gate_rows) if gated else None  # [M, W_e]
        up = _linear(x, gate_up, gate_up_bias, up_rows)  # [M, W_e]
        m = activate(gate, up, activation, limit, alpha)
        m = m.to(hidden.dtype).double()
        y = m @ down[gate_rows].double()  # [M, H]
        if down_bias is not None:
            y = y + down_bias[expert].double()
        out.index_add_(0, token, gates[token, slot, None].double() * y)
    return out


def activate(
    gate: Tensor | None, up: Tensor, activation: str, limit: float, alpha: float
) -> Tensor:
    """Return m from the gate and up projections; `gate` is None for experts without one."""
    if activation == "swiglu_oai":
        assert gate is not None
        gate = gate.clamp(max=limit)
        up = up.clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(alpha * gate)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "relu": functional.relu,
        "relu2": lambda x: functional.relu(x).square(),
    }
    act = functions[activation]
    return act(up) if gate is None else act(gate) * up


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, rows: slice) -> Tensor:
    projected = x @ weight[rows].double().T
    return projected if bias is None else projected + bias[rows].double()


def _rows_of_experts(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    bounds = offsets.tolist()
    for expert, (begin, end) in enumerate(itertools.pairwise(bounds)):
        yield expert, slice(begin, end)
