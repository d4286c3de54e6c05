"""Every method of the installed PEFT, and LoRA's variants, on a tiny model: trained before, it is what training starts
from, its teacher's reading is its own, it moves, and what is saved reads as what was trained; or it is refused by name.
"""

import copy
import tempfile

import peft
import tiny
import torch
from transformers.trainer_callback import PrinterCallback

from rmsd.words import first_line, named_line

_Q = dict(target_modules=["q_proj"])
_PROMPT = dict(num_virtual_tokens=3)

# What each method needs beside its defaults; those of PeftType's names that are missing here take `_Q`.
METHODS: dict[str, dict] = dict(
    PROMPT_TUNING=_PROMPT,
    MULTITASK_PROMPT_TUNING=_PROMPT,
    P_TUNING=_PROMPT,
    PREFIX_TUNING=_PROMPT,
    CARTRIDGE=_PROMPT,
    CPT=dict(cpt_token_ids=[5, 6, 7], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3]),
    ADALORA=dict(**_Q, total_step=2, tinit=0, tfinal=1, init_r=4, target_r=2),
    ADAMSS=dict(**_Q, r=8, num_subspaces=2),
    ADAPTION_PROMPT=dict(adapter_len=3, adapter_layers=1),
    C3A=dict(**_Q, block_size=8),
    FOURIERFT=dict(**_Q, n_frequency=50),
    GRALORA=dict(**_Q, r=4),
    IA3=dict(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    LN_TUNING=dict(target_modules=["input_layernorm"]),
    MISS=dict(**_Q, r=4),
    OFT=dict(**_Q, oft_block_size=4),
    PSOFT=dict(**_Q, r=4),
    ROAD=dict(**_Q, group_size=8),
    SHADOW=dict(),
    SHIRA=dict(**_Q, r=2),
    SUPERTUNING=dict(**_Q, sparsity=0.5),
    TRAINABLE_TOKENS=dict(token_indices=[2, 40]),
    UNILORA=dict(**_Q, theta_d_length=32),
    VBLORA=dict(**_Q, num_vectors=16, vector_length=8),
    WAVEFT=dict(**_Q, n_frequency=50),
)
_LORA = dict(**_Q, r=2)
LORA: dict[str, dict] = {
    "LORA, DoRA": dict(**_LORA, use_dora=True),
    "LORA, rank-stabilised": dict(**_LORA, use_rslora=True),
    "LORA, PiSSA": dict(**_LORA, init_lora_weights="pissa"),
    "LORA, biases": dict(**_LORA, bias="all"),
    "LORA, the head saved whole": dict(**_LORA, modules_to_save=["lm_head"]),
    "LORA, tokens": dict(**_LORA, trainable_token_indices=[2, 40]),
    "LORA, a bias of its own": dict(**_LORA, lora_bias=True),
    "LORA, parameters": dict(r=2, target_modules=[], target_parameters=["q_proj.weight"]),
    "LORA, invoked by tokens": dict(**_LORA, alora_invocation_tokens=[2]),
    "LORA, layers repeated": dict(**_LORA, layer_replication=[[0, 2], [1, 2]]),
}
NAMES = [*LORA, *(method.value for method in peft.PeftType)]


def base_of(name: str):
    kind = "llama" if name in ("ADAPTION_PROMPT", "LORA, layers repeated") else "qwen2"  # which has biases
    return tiny.model(kind, tie_word_embeddings=False)


def adapted(name: str):
    """A tiny model with a new adapter of the method."""
    if name != "XLORA":
        return peft.get_peft_model(base_of(name), config(name))
    with tempfile.TemporaryDirectory() as folder:  # a mixture of adapters that were trained before
        peft.get_peft_model(base_of(name), config("LORA")).save_pretrained(folder)
        mixed = {"first": folder, "second": folder}
        base = base_of(name)
        base.config.use_cache = False
        options = dict(adapters=mixed, hidden_size=base.config.hidden_size, xlora_size=8, task_type="CAUSAL_LM")
        return peft.get_peft_model(base, peft.XLoraConfig(**options))


def config(name: str) -> peft.PeftConfig:
    options = LORA.get(name) or METHODS.get(name, _Q)
    made = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name.partition(",")[0])]
    return made(**options, task_type="CAUSAL_LM")


def tried(name: str) -> tuple[str, str]:
    """(result, what was said): trains, refused, broken, or not tried."""
    torch.manual_seed(0)
    try:
        student = adapted(name)
    except Exception as error:
        return "not tried", f"no adapter on a tiny model: {named_line(error)}"
    with torch.no_grad():
        for value in student.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value) * 0.3)
    with tempfile.TemporaryDirectory() as folder:
        try:
            start = copy.deepcopy(student)
            made = tiny.trainer(folder, student, self_check=True, learning_rate=0.1, log_level="error")
            made.remove_callback(PrinterCallback)
            start = logits(start)
            made.train()
        except (ValueError, TypeError) as error:
            lines = len(str(error).strip().splitlines())
            return (
                ("refused", first_line(error)) if lines == 1 else ("broken", f"in {lines} lines: {first_line(error)}")
            )
        except Exception as error:
            return "broken", named_line(error)
        with made.teacher.active() as teacher:
            if not torch.allclose(logits(teacher), start, rtol=0, atol=1e-6):
                return "broken", "the teacher is not what training started from"
        end = logits(student)
        if torch.allclose(end, start, rtol=0, atol=1e-4):
            return "broken", "the student did not move"
        made.continue_from_student()
        with made.teacher.active() as teacher:
            if not torch.allclose(logits(teacher), end, rtol=0, atol=1e-6):
                return "broken", "after a continuation the teacher is not the student"
        made.save_model(folder)
        try:
            if not torch.allclose(
                logits(peft.PeftModel.from_pretrained(base_of(name), folder)), end, rtol=0, atol=1e-5
            ):
                return "broken", "what was saved is not what was trained"
        except Exception as error:
            return "broken", f"what was saved does not load: {named_line(error)}"
    return "trains", ""


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(torch.tensor([[5, 6, 2, 40, 41]])).logits
