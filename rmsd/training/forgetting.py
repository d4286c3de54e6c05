"""Stops a run that forgets."""

import logging
import math

from transformers import TrainerCallback

log = logging.getLogger("rmsd")


class DriftLimit(TrainerCallback):
    """Ends training at the first evaluation whose `eval_drift` exceeds `max_drift`, nats a token, or is no number. What
    was best before is loaded where `load_best_model_at_end` says so: `metric_for_best_model: score` weighs the target
    against drift and specificity."""

    def __init__(self, max_drift: float):
        self.max_drift = max_drift

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        drift = (metrics or {}).get("eval_drift", 0.0)
        if drift > self.max_drift or math.isnan(drift):
            if state.is_world_process_zero:
                log.warning(
                    "stopped at step %d: drift is %.3f nats a token, more than evaluate.max_drift=%g",
                    state.global_step,
                    drift,
                    self.max_drift,
                )
            control.should_training_stop = True
