# SPDX-License-Identifier: Apache-2.0
"""Every family goes the whole way: calibrate, plan, prune, load, save again."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from family_sweep import experts_classes, lines_of_tables
from support.shrinking import tiny_configs
from support.tiny_models import (
    FAMILIES,
    make_model,
    make_samples,
    save_model,
    stored_tensors,
    token_ids,
)
from tenp import adapter, calibration, evaluation, planning, pruning, scoring
from tenp.checkpoint import Checkpoint
from tenp.errors import Unsupported
from tenp.plan import Plan
from tenp.planning import Budget
from tenp.runtime import TenpExperts
from tenp.scores import Scores
from tenp.statistics import Statistics

#: Families in which a config field sets the width of the shared expert as well, to how many times that of
#: the routed ones.
SHARED_WIDTH = {"deepseek_v2": 2, "deepseek_v3": 1, "glm4_moe": 1, "ernie4_5_moe": 1}


#: Model types that are refused, and what the sentence says of them.
REFUSED = {
    "llama4_text": r"feed_forward\.experts .*, whose call is \(hidden_states\) and not",
    "jetmoe": r"mlp\.input_linear .*, whose call is \(inputs, expert_size\) and not",
    "dbrx": r"ffn\.experts .* without a 3-D down_proj for all of them",
    "longcat_flash": r"of which some have no weights: its parameters are of \[6, 8\] experts",
    "step3p7": r"without transformers' @use_experts_implementation and cannot be stood in for",
    "muse_spark": r"normalises each expert's output, which pruning would change",
    "ernie4_5_vl_moe": r"one set of routed experts in a layer, got .*text_moe.* and .*vision_moe",
    "switch_transformers": r"must be a language model that predicts next tokens",
    "llama": r"got a dense model: looked for modules with a 3-D down_proj",
}

MODELS_PAGE = Path(__file__).parents[1] / "docs/models.md"


@pytest.mark.parametrize("model_type", list(REFUSED))
def test_what_cannot_be_served_is_refused_before_any_weight_is_read(model_type: str) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    if model_type == "dbrx" and transformers.__version__.startswith("5.17."):
        pytest.skip("this transformers refuses to make the config from its own dictionary")
    config = next(tiny_configs(model_type))()
    with pytest.raises(Unsupported, match=REFUSED[model_type]):
        adapter.find_experts(adapter.empty_model(config))


def test_the_page_has_a_row_for_every_experts_class() -> None:
    if f"transformers {transformers.__version__} " not in MODELS_PAGE.read_text():
        pytest.skip("the page is of another version of transformers")
    assert set(lines_of_tables(MODELS_PAGE)) == {experts.name for experts in experts_classes()}


@dataclass(frozen=True)
class Family:
    """One family, pruned to different widths, 0 among them."""

    name: str
    root: Path
    dense: Checkpoint
    statistics: Statistics
    scores: Scores
    plan: Plan
    pruned: PreTrainedModel
    masked_logits: Tensor  # of the dense model, its pruned neurons silenced


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, tmp_path_factory: pytest.TempPathFactory) -> Family:
    root = tmp_path_factory.mktemp(request.param)
    dense = Checkpoint(save_model(root / "dense", request.param))
    source = pruning.source_of(dense)
    samples = [make_samples(lengths=(20, 33, 9))]
    model = adapter.load_model(dense.directory, torch.float32)
    statistics = calibration.collect(model, samples, source, batch_tokens=60)
    scores = scoring.score(statistics)
    plan = planning.plan(scores, statistics, Budget(0.5, alpha=0.4, width_multiple=1))
    for keep in plan.keep.values():
        keep[1] = False
    pruning.apply(dense, plan, root / "pruned")
    evaluation.mask_neurons(model, plan)
    with torch.no_grad():
        logits = model(token_ids()).logits
    pruned = adapter.load_model(root / "pruned", torch.float32)
    return Family(request.param, root, dense, statistics, scores, plan, pruned, logits)


def _assert_equal_to_masked(family: Family, model: PreTrainedModel) -> None:
    with torch.no_grad():
        difference = (model(token_ids()).logits - family.masked_logits).abs().max()
    assert difference <= 1e-5 * family.masked_logits.abs().max()


def test_the_sources_figures_are_the_models(family: Family) -> None:
    model = make_model(family.name)
    [experts, *_] = adapter.find_experts(model)
    source = family.plan.source
    # A head tied to the embeddings is stored once.
    sizes = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    assert source.parameters == sum(sizes.values())
    stored = sum(parameter.numel() for parameter in experts.module.parameters())
    biases = experts.biases()[2]
    routed = stored - (0 if biases is None else biases.numel())
    assert source.neuron_parameters * experts.num_experts * experts.width == routed


def test_projections_add_up_to_output_norms(family: Family) -> None:
    for tensors in family.statistics.layers.values():
        torch.testing.assert_close(
            tensors["projection"].sum(-1), tensors["norm_sum"], rtol=1e-6, atol=1e-6
        )


def test_the_pruned_model_computes_what_the_masked_dense_one_does(family: Family) -> None:
    assert min(min(widths) for widths in family.plan.widths().values()) == 0
    _assert_equal_to_masked(family, family.pruned)


def test_the_forecast_of_the_size_is_exact(family: Family) -> None:
    written = Checkpoint(family.root / "pruned")
    assert written.parameters == family.plan.total_parameters()
    assert written.bytes == family.plan.total_bytes()


def test_saving_again_writes_the_same_tensors(family: Family, tmp_path: Path) -> None:
    assert any(isinstance(module, TenpExperts) for module in family.pruned.modules())
    family.pruned.save_pretrained(tmp_path / "again", max_shard_size="150KB")
    ours, theirs = Checkpoint(tmp_path / "again"), Checkpoint(family.root / "pruned")
    assert ours.tensors.keys() == theirs.tensors.keys()
    again, before = (stored_tensors(c) for c in (ours, theirs))
    for name, tensor in before.items():
        assert torch.equal(again[name], tensor), name


def test_the_kernel_knows_the_familys_activation(family: Family) -> None:
    kernels = {m._kernel for m in family.pruned.modules() if isinstance(m, TenpExperts)}
    expected = {"gpt_oss": ("swiglu_oai", 7.0, 1.702), "gemma4_text": ("gelu_tanh", 0.0, 0.0)}
    assert kernels == {expected.get(family.name, ("silu", 0.0, 0.0))}


def test_a_padded_export_computes_the_same_in_stock_modules(family: Family) -> None:
    padded = family.root / "padded"
    pruning.export_padded(Checkpoint(family.root / "pruned"), padded)
    written = Checkpoint(padded)
    assert written.config == family.dense.config
    assert _shapes(written) == _shapes(family.dense)  # under the same names
    model = adapter.load_model(padded)
    assert not any(isinstance(module, TenpExperts) for module in model.modules())
    _assert_equal_to_masked(family, model)


def _shapes(checkpoint: Checkpoint) -> dict[str, object]:
    return {name: (entry.dtype, entry.shape) for name, entry in checkpoint.tensors.items()}


@pytest.mark.parametrize("width", [16, 12])
def test_equal_widths_give_a_stock_checkpoint_where_the_config_can_say_so(
    family: Family, width: int, tmp_path: Path
) -> None:
    full = next(iter(family.plan.keep.values())).shape[1]
    budget = Budget((width + 1) / full, method="enp", width_multiple=4)
    plan = planning.plan(family.scores, family.statistics, budget)
    assert plan.uniform_width() == width
    pruning.apply(family.dense, plan, tmp_path / "enp")
    # The shared expert keeps its width if that is a multiple of the new one.
    stock = SHARED_WIDTH.get(family.name, 0) * full % width == 0
    assert ("quantization_config" in Checkpoint(tmp_path / "enp").config) != stock
    evaluation.mask_neurons(model := adapter.load_model(family.dense.directory), plan)
    with torch.no_grad():
        expected = model(token_ids()).logits
        found = adapter.load_model(tmp_path / "enp")(token_ids()).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
