"""Optimizers behind one interface: ScaledAdam, AdamW, and Muon with AdamW.

- A recipe writes a config (`ScaledAdamConfig`, `AdamWConfig`, `MuonConfig`); its `build(model)` gives an `Optimizer`.
- The complete state is a flat dict of tensors keyed by parameter names: no pickle, and resuming is bit-identical.
- An `lr_scale` attribute on any module multiplies the learning rate of everything below it.
- Parameters narrower than fp32 get an fp32 master copy, which is part of the state.
- A NaN or infinite gradient skips the update and leaves parameters and state as they were.

Build the optimizer once the model holds its initial weights and stands on its device.
"""

from typing import Annotated

from pydantic import Field

from longwave.training.optimizers.adamw import AdamWConfig
from longwave.training.optimizers.muon import MuonConfig
from longwave.training.optimizers.scaled_adam import ScaledAdam, ScaledAdamConfig
from longwave.training.optimizers.weights import Optimizer, StepReport, trainable_weights

OptimizerConfig = Annotated[ScaledAdamConfig | AdamWConfig | MuonConfig, Field(discriminator="kind")]

__all__ = [
    "AdamWConfig",
    "MuonConfig",
    "Optimizer",
    "OptimizerConfig",
    "ScaledAdam",
    "ScaledAdamConfig",
    "StepReport",
    "trainable_weights",
]
