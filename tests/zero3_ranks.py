"""One of two processes that train under DeepSpeed ZeRO-3; tests/test_zero3.py launches it, or runs it alone without.

    python tests/zero3_ranks.py FOLDER LORA

FOLDER/tiny is the model; what training ended in is left at FOLDER/model.
"""

import sys
from pathlib import Path

import tiny
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model

from rmsd import RMSDConfig
from rmsd.models.loading import load_model

CONFIG = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,  # or nothing of a tiny model would be in parts
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "zero_allow_untested_optimizer": True,  # SGD
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


def on_cpus() -> dict:
    """accelerate starts DeepSpeed on accelerators alone: its state is made here as it is there."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    return dict(deepspeed=CONFIG, use_cpu=False, accelerator_config={"use_configured_state": True})


def main(folder: Path, lora: bool, size: int, **options):
    known = RMSDConfig(output_dir=str(folder), **options)  # ZeRO-3 loads models in parts from here on
    model, _ = load_model(str(folder / "tiny"))
    if lora:
        tiny.torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    made = tiny.trainer(
        folder / "run",
        model,
        rows=[*tiny.ROWS, *tiny.ROWS],
        max_steps=3,
        optim="sgd",
        max_grad_norm=0.0,
        learning_rate=1.0,
        threshold=1e-5,  # an anchor's gaps are rounding until something is learned
        per_device_train_batch_size=size,
        gradient_accumulation_steps=2,
        self_check=True,
        **options,
    )
    made.train()
    made.save_model(str(folder / "model"))
    del known
    return made


if __name__ == "__main__":
    state = on_cpus()
    made = main(Path(sys.argv[1]), sys.argv[2] == "True", 2, **state)
    weights = list(made.student.parameters())
    assert all(weight.numel() < weight.ds_numel for weight in weights if weight.ds_numel > 1), "in parts"
