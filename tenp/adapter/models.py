# SPDX-License-Identifier: Apache-2.0
"""Load configs and models, whole or as shapes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from tenp import devices
from tenp.errors import CheckpointError, TenpError, Unsupported


def load_config(directory: Path) -> PreTrainedConfig:
    """Read `config.json`.

    Raises:
        Unsupported: This version of transformers does not know the architecture.
        CheckpointError: The file cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(directory)
    except (ValueError, KeyError) as error:
        raise Unsupported(
            f"{directory / 'config.json'} must describe a model that transformers {transformers.__version__} knows: "
            f"looked for its model_type; {_first_line(error)}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{directory}: {_first_line(error)}") from error


def stored_dtype(config: PreTrainedConfig) -> torch.dtype:
    """Return the dtype that a checkpoint's config names; float32 if it names none."""
    dtype = getattr(config.get_text_config(), "dtype", None) or config.dtype
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype or "float32"))


def load_model(
    directory: Path, dtype: torch.dtype | str = "auto", device: str = "cpu"
) -> PreTrainedModel:
    """Load a language model for inference.

    Args:
        directory: A local checkpoint.
        dtype: `auto` is the checkpoint's own.
        device: A torch device, or `auto` to spread the model over what there is.

    Raises:
        Unsupported: The architecture is not known or is no language model, or the device is not
            there, too small, or nothing that this build of tenp can use.
        CheckpointError: The weights do not fit the config.
    """
    devices.require(device)
    if device == "auto" and torch.cuda.is_available() and not devices.has_cuda():
        device = "cpu"
    config = load_config(directory)
    stored = getattr(config, "quantization_config", None)
    if isinstance(stored, dict) and stored.get("quant_method") == "mxfp4":
        # Where there are kernels for MXFP4, its experts would be modules of another kind.
        config.quantization_config = {**stored, "dequantize": True}
    try:
        loaded: Any = _auto_class(config).from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            device_map=device,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below
        )
    except TenpError:
        raise
    except torch.OutOfMemoryError as error:
        raise Unsupported(
            f"{directory} must fit the memory of the device {device}, but does not; use --stream layers, "
            f"or another device: {_first_line(error)}"
        ) from error
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{directory} cannot be loaded: {_first_line(error)}") from error
    except ValueError as error:
        raise Unsupported(f"{directory}: {_first_line(error)}") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{directory} must hold {missing[0]}, but {len(missing)} weights are missing"
        )
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        raise CheckpointError(
            f"{directory}: {name} must be {tuple(wanted)}, as config.json says, got {tuple(stored)}"
        )
    return model.eval().requires_grad_(False)


def vocabulary(model: PreTrainedModel) -> int:
    """Return how many token embeddings the model has."""
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.num_embeddings)


def model_of_config(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """Return the model of a config with weights of no meaning.

    Raises:
        Unsupported: The architecture is no language model.
    """
    try:
        return _auto_class(config).from_config(config, **options)
    except ValueError as error:
        raise Unsupported(f"{config.model_type}: {_first_line(error)}") from error


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model of a config with weights on the meta device: shapes and names, no memory."""
    with torch.device("meta"):
        return model_of_config(config)


def _auto_class(config: PreTrainedConfig) -> Any:
    """What makes a model of a config: of text alone if there is such a class, else of text and more."""
    for auto in (AutoModelForCausalLM, AutoModelForMultimodalLM):
        if type(config) in auto._model_mapping:
            return auto
    raise Unsupported(
        f"{config.model_type} must be a language model that predicts next tokens, but transformers has no such "
        "class for it"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
