"""A callback of `transformers.Trainer` that tells a longwave model the optimizer step, on which its draws depend."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from longwave.errors import UserError
from longwave.model import Decoder


class StepCallback(TrainerCallback):
    """Tells a longwave model which optimizer step runs next: `Trainer(..., callbacks=[StepCallback()])`.

    Process p keys its draws by the training arguments' `seed` + p. A run that resumes from a Trainer checkpoint
    continues at the checkpoint's step. The model may be wrapped, as by PEFT.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **kwargs: Any
    ) -> None:
        self._tell(args, state, model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **kwargs: Any
    ) -> None:
        """Runs before Trainer saves or evaluates: causal thresholds take in the scores of the finished step here."""
        self._tell(args, state, model)

    def _tell(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        decoders = [module for module in model.modules() if isinstance(module, Decoder)]
        if not decoders:
            raise UserError(f"StepCallback: a {type(model).__name__} holds no longwave model; leave the callback out")
        decoders[0].set_step(state.global_step, args.seed + args.process_index)
