"""What `transformers.Trainer` needs to know of longwave: the optimizer step, which schedules and draws follow."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from longwave.errors import UserError
from longwave.model import Decoder


class StepCallback(TrainerCallback):
    """Tells a longwave model the optimizer step about to run: `Trainer(..., callbacks=[StepCallback()])`.

    The draws of process p are keyed by the arguments' `seed` + p. Resuming from a checkpoint of Trainer goes on at its
    step. The model may stand inside wrappers such as PEFT's.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **kwargs: Any
    ) -> None:
        self._tell(args, state, model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **kwargs: Any
    ) -> None:
        """Before anything is saved or evaluated: what causal thresholds saw in the step is folded in here."""
        self._tell(args, state, model)

    def _tell(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        decoders = [module for module in model.modules() if isinstance(module, Decoder)]
        if not decoders:
            raise UserError(f"StepCallback: a {type(model).__name__} holds no longwave model; leave the callback out")
        decoders[0].set_step(state.global_step, args.seed + args.process_index)
