"""Where each parameter of a student lies on the way from its input to its output, and how it wants to be trained."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from .model import MiniCodformerForConditionalGeneration

Kind = Literal["embedding", "matrix", "norm_or_bias", "liquid"]
EMBEDDING = "model.encoder.embed_tokens.weight"
LIQUID = ("rho", "conductance_bias")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterFact:
    name: str
    parameter: nn.Parameter
    kind: Kind
    """'liquid' is what sets the decay of a neuron: rho and the bias of its conductance."""
    depth: int
    """0 for the first encoder layer, encoder layers + decoder layers - 1 for the last of the decoder."""


def parameter_groups_by_depth(model: MiniCodformerForConditionalGeneration) -> Iterator[ParameterFact]:
    """Every parameter once, the tied embedding under its first name.

    The embedding and what widens it lie at depth 0, a final norm at the depth of the layer before it.
    """
    encoder_layers = model.config.num_encoder_layers
    deepest = encoder_layers + model.config.num_hidden_layers - 1
    for name, parameter in model.named_parameters():
        yield ParameterFact(
            name=name, parameter=parameter, kind=_kind(name, parameter), depth=_depth(name, encoder_layers, deepest)
        )


def _kind(name: str, parameter: nn.Parameter) -> Kind:
    if name == EMBEDDING:
        return "embedding"
    if name.rpartition(".")[-1] in LIQUID:
        return "liquid"
    return "norm_or_bias" if parameter.ndim < 2 else "matrix"


def _depth(name: str, encoder_layers: int, deepest: int) -> int:
    if layer := re.match(r"model\.(encoder|decoder)\.layers\.(\d+)\.", name):
        return int(layer[2]) + (encoder_layers if layer[1] == "decoder" else 0)
    if name.startswith("model.encoder.embed_tokens."):
        return 0
    return encoder_layers - 1 if name.startswith("model.encoder.") else deepest
