"""What a step takes, from a model's shapes and the trainer's arguments: bytes on a device, FLOPs, requests to a judge.

Weights are counted and never read, so a model on the meta device will do. Numbers of weights, and the bytes of weights,
gradients and optimizer states, are exact; what depends on how long answers get is counted for the longest, and so is
an upper estimate. A multiplication and an addition are 2 FLOPs.

Sources: Kaplan et al. 2020, "Scaling Laws for Neural Language Models" (2 FLOPs a weight and token forward, 4 backward,
and the attention's products beside them); Korthikanti et al. 2022, "Reducing Activation Recomputation in Large
Transformer Models" (what a layer keeps for its backward, and what checkpointing keeps instead).
"""

from typing import NamedTuple

from torch import nn

from rmsd_kernels.heads.projection import default_workspace_mb, row_chunks

from ..answers.teacher import trains_lora_alone
from ..models.parts import head_module
from ..step.wishes import ROWS_AT_ONCE
from ..training.config import RMSDConfig


class Lengths(NamedTuple):
    """Tokens of a sequence: on average, by which FLOPs are counted, and the longest, by which memory is."""

    prompt: float
    teacher_prompt: float
    answer: float
    longest_prompt: int
    longest_teacher_prompt: int
    longest_answer: int


class Sizes(NamedTuple):
    """A causal LM in numbers."""

    total: int  # weights; a tied head's are counted once
    trained: int
    weight_bytes: int
    trained_bytes: int
    body: int  # weights that every token is multiplied by: all matrices but the embeddings and the head
    body_trained: int
    linear_width: int  # elements that go into and come out of the body's linear layers, a token; adapters apart
    vocab: int
    hidden: int
    head_trained: bool
    has_adapter: bool
    has_lora: bool  # which a second adapter for the teacher can stand beside
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    element: int  # bytes of a weight as loaded, and so of a hidden state

    @classmethod
    def of(cls, model: nn.Module, quantised: float | None = None) -> "Sizes":
        """Of a causal LM of transformers or a PEFT model. Of a mixture every expert is counted. `quantised`: bytes that
        a weight of the linear layers will take, but of those that are trained and of the head."""
        head = head_module(model).weight
        linears = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Linear) and m.weight is not head}
        frozen = [weight for weight in linears.values() if not weight.requires_grad]
        saved = 0 if quantised is None else sum(weight.nbytes - quantised * weight.numel() for weight in frozen)
        embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
        weights = list(model.parameters())
        trained = [weight for weight in weights if weight.requires_grad]
        apart = {id(weight) for weight in (head, *embeddings)}
        body = {n: w for n, w in model.named_parameters() if w.dim() > 1 and id(w) not in apart}
        linear = [weight for name, weight in body.items() if ".lora_" not in name]
        config = model.config.get_text_config()
        heads = _most_of_layers(config, "num_attention_heads", 0)  # a state-space model has none
        return cls(
            total=_number(weights),
            trained=_number(trained),
            weight_bytes=sum(weight.nbytes for weight in weights) - round(saved),
            trained_bytes=sum(weight.nbytes for weight in trained),
            body=_number(body.values()),
            body_trained=_number(weight for weight in body.values() if weight.requires_grad),
            linear_width=sum(weight[..., 0, 0].numel() * sum(weight.shape[-2:]) for weight in linear),
            vocab=head.shape[0],
            hidden=head.shape[1],
            head_trained=head.requires_grad,
            has_adapter=hasattr(model, "peft_config"),
            has_lora=hasattr(model, "peft_config") and trains_lora_alone(model),
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=_most_of_layers(config, "num_key_value_heads", heads),
            head_dim=_most_of_layers(config, "head_dim", config.hidden_size // max(heads, 1)),
            element=head.element_size(),
        )


def _most_of_layers(config, name: str, default: int) -> int:
    """A config's number; the largest, where layers differ in it, as Gemma 4's do in the size of a head."""
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    return max(getattr(layer, name, None) or default for layer in layers)


def _number(weights) -> int:
    return sum(weight.numel() for weight in weights)


# ---- bytes ---------------------------------------------------------------------------------------------------------


def memory(
    sizes: Sizes,
    args: RMSDConfig,
    lengths: Lengths,
    *,
    processes: int = 1,
    generated: bool = True,
    on_gpu: bool = False,
    contrasted: float = 0.0,
) -> dict:
    """Bytes on one device, {phase: {part: bytes}}. "throughout" is held beside each of the other two phases.
    `contrasted` is the share of rows whose answers the teacher reads under a contrast context too.

    With `args.fsdp` weights, gradients and optimizer states are divided by `processes`; a copied teacher is whole on
    each, and so are the weights while rollouts are made (rmsd.models.sharding.whole).
    """
    shards = processes if args.fsdp else 1
    workspace = _workspace_mb(on_gpu) * 2**20
    rows, low = args.per_device_train_batch_size, args.bf16 or args.fp16
    element = 2 if low else sizes.element
    read = lengths.longest_prompt + lengths.longest_answer
    written = read if not args.guided_rollouts else max(read, lengths.longest_teacher_prompt + lengths.longest_answer)
    throughout = {
        "student's weights": sizes.weight_bytes / shards,
        "optimizer's states": optimizer_bytes(sizes, args) / shards,
        "teacher": teacher_bytes(sizes, args),
        "evaluator's copy of the base head": sizes.vocab * sizes.hidden * sizes.element if args.do_eval else 0,
        "hidden states of all answers": ((1 if args.engine_scores else 2) + bool(args.unkept_kl))
        * args.gradient_accumulation_steps
        * rows
        * lengths.longest_answer
        * sizes.hidden
        * element,
    }
    elsewhere = args.engine == "vllm_server"  # and what it holds is on other devices
    if args.engine_scores and elsewhere:
        rollouts = {}
    elif args.engine_scores:  # logits, and their log-softmax, of one sequence that it reads
        told = lengths.longest_teacher_prompt + lengths.longest_answer
        rollouts = {"vllm's logits of an answer it reads": 2 * 4 * sizes.vocab * told}
    else:
        rollouts = {
            "scores' logits, a chunk at a time": workspace,
            "candidates' logits": _wishes_bytes(sizes, args, 7 if contrasted else 5),
        }
        if contrasted:  # as read beside the others, and apart
            hidden = rows * lengths.longest_answer * sizes.hidden * element
            rollouts["hidden states under the contrast contexts"] = 3 * hidden
    if generated and args.engine == "vllm":
        rollouts["vllm's weights"] = sizes.weight_bytes
        rollouts["KV cache (engine_cache_gb)"] = args.engine_cache_gb * 2**30
    elif generated and not elsewhere:
        rollouts["KV cache"] = kv_bytes(sizes, rows, written, element)
    training = {
        "gradients": sizes.trained_bytes / shards,
        "activations": activation_bytes(sizes, args, rows * read, element),
        # The workspace, and beside it a third of it at most (rmsd_kernels.heads.linear).
        "loss: logits of the kept rows": workspace * 4 / 3,
        "loss: gradient of the head, fp32": 4 * sizes.vocab * sizes.hidden * sizes.head_trained,
    }
    if args.fsdp:
        whole = sizes.total * element
        rollouts["weights gathered whole"] = whole
        training["weights gathered: the head's, two layers'"] = (
            sizes.vocab * sizes.hidden + 2 * sizes.body / sizes.layers
        ) * element
    elif low and sizes.element == 4:
        # Autocast casts a trained weight once a forward; a frozen one's copy is kept for the backward alone.
        rollouts["16-bit copies of weights"] = 2 * sizes.trained
        training["16-bit copies of weights"] = 2 * sizes.total
    return {"throughout": throughout, "while rollouts are made": rollouts, "while the student trains": training}


def optimizer_bytes(sizes: Sizes, args: RMSDConfig) -> float:
    """Two states a trained weight in its own precision, as AdamW keeps, which also stands for optimizers unknown here;
    two bytes in 8 bits; none for SGD. A counter of 4 bytes a tensor is left out."""
    name = str(getattr(args.optim, "value", args.optim))
    return 0 if name == "sgd" else 2 * sizes.trained if "8bit" in name else 2 * sizes.trained_bytes


def teacher_bytes(sizes: Sizes, args: RMSDConfig) -> int:
    """A frozen copy of the model; with a LoRA nothing, or a second adapter once the teacher is not the initial
    model; beside either, where it is a moving average, 4 bytes for each of its weights of 2 (rmsd.answers.teacher)."""
    if not sizes.has_lora:
        weights, held = sizes.total, 0 if args.teacher in ("live", "adapter_off") else sizes.weight_bytes
    else:
        moves = args.teacher == "ema" or args.continuation_steps or args.continuation_metric
        weights, held = sizes.trained, sizes.trained_bytes if moves else 0
    return held + 2 * (4 * weights - held) * (args.teacher == "ema")


def kv_bytes(sizes: Sizes, rows: int, length: int, element: int) -> int:
    """A key and a value a layer and token. Layers of a sliding window keep less."""
    return 2 * rows * length * sizes.layers * sizes.kv_heads * sizes.head_dim * element


def activation_bytes(sizes: Sizes, args: RMSDConfig, tokens: int, element: int) -> float:
    """Twice what goes into and comes out of the linear layers, adapters apart: norms, rotations, attention and the gate
    keep about as much between them (never more in what tests/test_costs.py measures). Three times in 16 bits, where
    norms and adapters keep fp32. With gradient checkpointing each layer keeps its input, and one at a time the rest and
    a quarter more, for the gradients that pass. Eager attention keeps its weights too, which are not counted."""
    every = (2 if element > 2 else 3) * sizes.linear_width * tokens * element
    if not args.gradient_checkpointing:
        return every
    inputs = (sizes.layers + 3) * sizes.hidden * tokens * element  # 3: of the last norm
    return inputs + 1.25 * every / sizes.layers


def _wishes_bytes(sizes: Sizes, args: RMSDConfig, tensors: int) -> int:
    """So many of logits' shape at once at the most, in fp32 (rmsd.step.wishes.wishes)."""
    return tensors * 4 * sizes.vocab * min(ROWS_AT_ONCE, args.per_device_train_batch_size * args.num_candidates)


# ---- FLOPs ---------------------------------------------------------------------------------------------------------


def flops(
    sizes: Sizes,
    args: RMSDConfig,
    lengths: Lengths,
    *,
    generated: bool = True,
    on_gpu: bool = False,
    contrasted: float = 0.0,
) -> dict[str, float]:
    """FLOPs of one sequence, by part. Every sequence is taken to keep its `num_kept` tokens, the last at its end: those
    that keep nothing, and what follows the last kept token, take no part in training and cost less."""
    prompt, told, answer = lengths.prompt, lengths.teacher_prompt, lengths.answer
    row = 2 * sizes.vocab * sizes.hidden  # one row through the head
    kept = answer if args.method == "opsd" else min(args.num_kept, answer)
    parts = {}
    # An adapter that is switched off multiplies nothing; a second one, as a continuation makes, does.
    off = sizes.body_trained if sizes.has_adapter and args.teacher != "live" and not teacher_bytes(sizes, args) else 0
    guided = args.guided_rollouts if generated else 0.0  # of told rows, for which all are taken
    if generated:
        by_student, by_teacher = _sampling(sizes, prompt, answer), _sampling(sizes, told, answer)
        by_teacher -= 2 * off * (told + answer - 1)
        parts["sampling the answer"] = (1 - guided) * by_student + guided * by_teacher + row * answer
    if args.engine_scores:  # with adapters merged, and the head over the prompt too
        for reader, length in {"student": prompt + answer, "teacher": told + answer}.items():
            if reader == "teacher" or not generated:
                merged = 2 * sizes.body_trained * sizes.has_adapter
                parts[f"engine reads the answer as {reader}"] = _forward(sizes, length) + (row - merged) * length
    elif not generated or guided or args.engine != "transformers":  # which records the hidden states as it samples
        parts["student reads its answer"] = _forward(sizes, prompt + answer)
    recomputed = 2 if args.gradient_checkpointing else 1
    backward = (2 * sizes.body + 2 * sizes.body_trained) * (prompt + answer)
    backward += 2 * _attention(sizes, prompt + answer, prompt + answer)
    parts["teacher reads the answer"] = _forward(sizes, told + answer) - 2 * off * (told + answer)
    if contrasted:
        again = parts["teacher reads the answer"]
        if args.engine_scores:  # which reads all of it, with the head over the prompt too
            again = parts["engine reads the answer as teacher"]
        else:
            again += row * args.num_candidates
        parts["teacher reads it under the contrast context"] = contrasted * again
    if args.forward_kl_above is not None:
        parts["head: forward KL of the kept tokens"] = row * kept * _loss_products(sizes, args, kept, on_gpu)
    if args.unkept_kl:
        unkept = answer - kept
        parts["teacher reads the answer, untold"] = _forward(sizes, prompt + answer) - 2 * off * (prompt + answer)
        parts["head: loss of the tokens that are not kept"] = row * unkept * _loss_products(sizes, args, unkept, on_gpu)
    if args.engine_scores:
        parts["head: the engine's scores checked, both models"] = 2 * row * kept
    else:
        parts["head: scores of every token, both models"] = 2 * row * answer
        parts["head: what the teacher wants at the candidates"] = 2 * row * args.num_candidates
    return parts | {
        "student's training forward": recomputed * _forward(sizes, prompt + answer),
        "student's training backward": backward,
        "head: loss of the kept tokens": row * kept * _loss_products(sizes, args, kept, on_gpu),
    }


def _sampling(sizes: Sizes, prompt: float, answer: float) -> float:
    """But for the head. The answer's t-th token reads prompt + t, and the last one is not read."""
    tokens = 2 * sizes.body * (prompt + answer - 1)
    return tokens + _attention(sizes, prompt, prompt) + _attention(sizes, 1, (answer - 1) * (prompt + answer / 2))


def _loss_products(sizes: Sizes, args: RMSDConfig, kept: float, on_gpu: bool) -> int:
    """Both models' logits, once more in the backward where the forward cannot keep them, and the gradients of hidden
    states and weight (rmsd_kernels.heads.linear)."""
    rows = max(1, round(kept * args.per_device_train_batch_size))
    keeps = len(row_chunks(rows, 3 * 3 * sizes.vocab, _workspace_mb(on_gpu))) == 1
    return (2 if keeps else 4) + 1 + sizes.head_trained


def _workspace_mb(on_gpu: bool) -> float:
    return default_workspace_mb("gpu" if on_gpu else "cpu")


def _forward(sizes: Sizes, tokens: float) -> float:
    return 2 * sizes.body * tokens + _attention(sizes, tokens, tokens)


def _attention(sizes: Sizes, queries: float, keys: float) -> float:
    """Queries @ keys and weights @ values; kernels that skip what a causal mask hides take half."""
    return 4 * sizes.layers * sizes.heads * sizes.head_dim * queries * keys


# ---- requests ------------------------------------------------------------------------------------------------------


def judged_at_most(rollouts: int, rows: int, judged_rows: int) -> int:
    """Of that many rollouts over a data set of `rows`, taken in full passes, how many can be of the `judged_rows` that
    have a privileged context: those a judge is asked about, once each."""
    passes, rest = divmod(rollouts, rows)
    return passes * judged_rows + min(rest, judged_rows)
