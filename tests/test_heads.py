"""Output heads as users have them: each trains what the model's own logits would, or is refused with what to do."""

import contextlib
import enum
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import trainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from rmsd import LinearRMSDLoss, RMSDLoss
from rmsd.answers.rollout import Rollouts, generate, hidden_states
from rmsd.answers.teacher import Teacher
from rmsd.models.heads import OutputHead, mixed_precision_dtype
from rmsd.models.hidden import completion_hidden
from rmsd.models.parts import captured_hidden, causal_lm, no_head
from rmsd.models.sharding import whole

HEADS = {
    "tied": ("llama", dict(tie_word_embeddings=True)),
    "untied": ("llama", dict(tie_word_embeddings=False)),
    "bias": ("phi", dict()),
    "gemma2": ("gemma2", dict(final_logit_softcapping=2.0)),
    "gemma3": ("gemma3_text", dict(final_logit_softcapping=2.0)),
    "granite": ("granite", dict(logits_scaling=0.25)),
    "granitemoe": ("granitemoe", dict(logits_scaling=0.25, num_local_experts=2)),
    "cohere": ("cohere", dict(logit_scale=3.0)),
    "cohere2": ("cohere2", dict(logit_scale=3.0)),
}
IDS = torch.arange(20, 32).view(2, 6)
MASK = torch.ones(2, 6, dtype=torch.bool)


def model_with(name: str, seed: int = 0):
    kind, overrides = HEADS[name]
    model = tiny.model(kind, seed, **overrides)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # Away from initial values, at which a bias is 0 and logits are too small for a softcap to bend.
        for parameter in {model.get_output_embeddings().weight, getattr(model.get_output_embeddings(), "bias", None)}:
            if parameter is not None:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def hidden_and_logits(model):
    with captured_hidden(model) as captured:
        logits = model(IDS).logits
    return captured[-1], logits


def linear_loss(student_hidden, student: OutputHead, teacher_hidden, teacher: OutputHead):
    return LinearRMSDLoss(vocab_topk=None)(
        student_hidden,
        student.weight,
        teacher_hidden,
        teacher.weight,
        IDS,
        MASK,
        student_bias=student.bias,
        teacher_bias=teacher.bias,
        **student.transform,
    )


@pytest.mark.parametrize("name", HEADS)
def test_the_heads_gradients_are_those_of_the_models_own_logits(name):
    teacher = model_with(name, seed=1)
    with torch.no_grad():
        teacher_hidden, teacher_logits = hidden_and_logits(teacher)
    grads = []
    for linear in (True, False):
        student = model_with(name)
        head = OutputHead.of(student)
        hidden, logits = hidden_and_logits(student)
        if linear:
            loss = linear_loss(hidden, head, teacher_hidden, OutputHead.of(teacher))
        else:
            loss = RMSDLoss(vocab_topk=None)(logits, teacher_logits, IDS, MASK)
        loss.backward()
        grads.append({name: value.grad for name, value in student.named_parameters()})
    assert loss > 1e-3
    for parameter, grad in grads[1].items():
        torch.testing.assert_close(
            grads[0][parameter], grad, rtol=1e-3, atol=1e-5, msg=lambda m, p=parameter: f"{p}: {m}"
        )
    if name == "bias":
        assert grads[0]["lm_head.bias"].abs().sum() > 0


# ---- padded vocabularies -------------------------------------------------------------------------------------------


def padded(rows: int, named: int):
    model = tiny.model(tie_word_embeddings=False)
    model.resize_token_embeddings(rows)
    model.config.vocab_size = named
    return model


@pytest.mark.parametrize(
    ("rows", "named"), [(320, 320), (320, 300)], ids=["tokenizer smaller", "config and tokenizer smaller"]
)
def test_padding_rows_belong_to_the_distribution_as_they_do_for_the_model(rows, named, tmp_path):
    assert len(tiny.tokenizer()) <= 300
    model = padded(rows, named)
    head = OutputHead.of(model)
    hidden, logits = hidden_and_logits(model)
    assert logits.shape[-1] == rows
    torch.testing.assert_close(head(hidden), logits)
    made = trainer(tmp_path, padded(rows, named), max_steps=1)
    made.train()
    assert any("kept_tokens" in entry and entry["kept_tokens"] > 0 for entry in made.state.log_history)


# ---- PEFT ----------------------------------------------------------------------------------------------------------


def peft_model(**options):
    peft = pytest.importorskip("peft", reason="peft: pip install peft")
    torch.manual_seed(0)
    return peft.get_peft_model(tiny.model(tie_word_embeddings=False), peft.LoraConfig(task_type="CAUSAL_LM", **options))


@pytest.mark.parametrize("teacher", ["adapter_off", "live", "ema"])
def test_a_head_in_modules_to_save_is_the_students_and_the_teacher_keeps_its_own(teacher, tmp_path):
    model = peft_model(target_modules=["q_proj"], modules_to_save=["lm_head"])
    original = model.get_base_model().lm_head.original_module.weight
    saved = model.get_base_model().lm_head.modules_to_save["default"].weight
    before = original.clone()
    made = trainer(tmp_path, model, teacher=teacher, ema_decay=0.5)
    made.train()
    assert not torch.equal(saved, before), "the adapter's copy is what trains"
    assert torch.equal(original, before)
    assert made.student_head().weight is saved
    if teacher == "ema":
        follower = model.get_base_model().lm_head.modules_to_save["teacher"].weight
        assert made.teacher.head.weight is follower
        assert not torch.equal(follower, before)
        assert not torch.equal(follower, saved)
    else:
        assert made.teacher.head.weight is (saved if teacher == "live" else original)
    assert saved.requires_grad, "asking for the teacher's head leaves the student's trainable"
    with made.teacher.active() as active:
        hidden, logits = hidden_and_logits(active)
        torch.testing.assert_close(made.teacher.head(hidden), logits)


def test_lora_on_the_head_is_refused():
    model = peft_model(target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"PeftModelForCausalLM has an adapter layer .*modules_to_save") as error:
        OutputHead.of(model)
    assert "\n" not in str(error.value)


# ---- forwards without a head ---------------------------------------------------------------------------------------


class VocabularyWide(TorchDispatchMode):
    """Counts the products that read or write a tensor as wide as the vocabulary."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.linear):
            shapes = [tensor.shape for tensor in (*args, result) if isinstance(tensor, torch.Tensor)]
            self.count += any(VOCAB in shape for shape in shapes)
        return result


VOCAB = len(tiny.tokenizer())


@pytest.mark.parametrize(
    "make_model",
    [
        *(pytest.param(partial(model_with, name), id=name) for name in ("tied", "bias", "gemma2", "cohere")),
        pytest.param(lambda: peft_model(target_modules=["q_proj"]), id="lora"),
        pytest.param(lambda: peft_model(target_modules=["q_proj"], modules_to_save=["lm_head"]), id="modules_to_save"),
    ],
)
def test_scoring_teacher_and_training_forwards_run_no_product_as_wide_as_the_vocabulary(make_model):
    model = make_model()
    rollouts = Rollouts([[7, 8], [9, 10, 11]], IDS, MASK)
    teacher = Teacher(model)
    with VocabularyWide() as spied:
        model(input_ids=IDS)
    assert spied.count == 1, "the spy sees a head"
    with VocabularyWide() as spied:
        scoring = hidden_states(model, rollouts, 0)
        of_teacher = teacher.hidden(rollouts.prompt_ids, rollouts, 0)
        training = completion_hidden(model, rollouts.prompt_ids, IDS, MASK, 0, one_forward=True)
        training.sum().backward()
    assert spied.count == 0
    with VocabularyWide() as spied:
        generate(model, rollouts.prompt_ids, max_new_tokens=3, pad_id=0, eos_ids=[])
    assert spied.count == 3, "one a token, and the head is as it was"
    with torch.no_grad():
        sequences = [[*prompt, *ids] for prompt, ids in zip(rollouts.prompt_ids, IDS.tolist(), strict=True)]
        whole = [model(input_ids=torch.tensor([ids])).logits[0, -len(IDS[0]) - 1 : -1] for ids in sequences]
    head = OutputHead.of(model)
    for hidden in (scoring, of_teacher, training):
        torch.testing.assert_close(head(hidden), torch.stack(whole), rtol=1e-4, atol=1e-5)


def test_the_prefill_projects_the_last_position_alone_from_contiguous_memory():
    model, seen = tiny.model(), []
    model.lm_head.register_forward_hook(lambda head, inputs, output: seen.append(inputs[0]))
    generate(model, [[7, 8], [9, 10, 11]], max_new_tokens=2, pad_id=0, eos_ids=[])
    assert [tuple(hidden.shape) for hidden in seen] == [(2, 1, 32)] * 2
    assert all(hidden.is_contiguous() for hidden in seen)


def test_a_forward_put_on_the_head_by_others_is_put_back():
    model = tiny.model()
    model.lm_head.forward = own = model.lm_head.forward
    with no_head(model):
        assert not model(input_ids=IDS).logits.any()
    assert model.lm_head.forward is own


# ---- sharded heads -------------------------------------------------------------------------------------------------


def test_under_mixed_precision_on_a_gpu_the_head_is_read_in_16_bits():
    """A frozen weight is cast once for both models that share it, until it changes; a trained one's gradient is its
    own dtype's."""
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert mixed_precision_dtype(gpu, bf16=True, fp16=False) == torch.bfloat16
    assert mixed_precision_dtype(gpu, bf16=False, fp16=True) == torch.float16
    assert (
        mixed_precision_dtype(gpu, bf16=False, fp16=False) is mixed_precision_dtype(cpu, bf16=True, fp16=False) is None
    )
    model = tiny.model("llama").requires_grad_(False)
    head = OutputHead.of(model)
    cast = head.in_dtype(torch.bfloat16)
    assert cast.weight.dtype == torch.bfloat16 and head.in_dtype(None) is head
    assert OutputHead.current(model, head.transform).in_dtype(torch.bfloat16).weight is cast.weight
    head.weight.mul_(2)
    assert torch.equal(head.in_dtype(torch.bfloat16).weight, head.weight.bfloat16())
    head.weight.requires_grad_()
    head.in_dtype(torch.bfloat16).weight.sum().backward()
    assert head.weight.grad.dtype == torch.float32


def test_the_trainer_and_its_teacher_read_the_head_in_the_dtype_of_mixed_precision(tmp_path, monkeypatch):
    made = trainer(tmp_path)
    made.head_dtype = made.teacher._head_dtype = torch.bfloat16
    seen = []
    forward = made.loss.forward

    def noted(*heads, **options):
        seen.append([tensor.dtype for tensor in heads[:4]])
        return forward(*heads, **options)

    monkeypatch.setattr(made.loss, "forward", noted)
    made.train()
    assert seen and all(dtype == torch.bfloat16 for dtypes in seen for dtype in dtypes)


class ZeroStatus(enum.Enum):
    AVAILABLE = 1
    NOT_AVAILABLE = 2


def in_parts(model, monkeypatch):
    """As DeepSpeed ZeRO-3 has it, of one process: weights are empty between their uses, and hooks gather a module's.
    The real one is tried by test_zero3.py where it is installed. Returns the ids of what is gathered, as it is."""
    log = []

    def made(parameter, number):
        whole_of = parameter.detach().clone()

        def all_gather(param_list=None):
            log.append(number)
            parameter.data, parameter.ds_status = whole_of.clone(), ZeroStatus.AVAILABLE

        def partition(param_list=None, **options):
            parameter.data, parameter.ds_status = torch.empty(0), ZeroStatus.NOT_AVAILABLE

        parameter.ds_id, parameter.all_gather, parameter.partition = number, all_gather, partition
        partition()

    def gather(module, *args):
        for parameter in module.parameters(recurse=False):
            if parameter.ds_status is ZeroStatus.NOT_AVAILABLE:
                parameter.all_gather()

    def release(module, *args):
        for parameter in module.parameters(recurse=False):
            parameter.partition()

    @contextlib.contextmanager
    def gathered_parameters(parameters):
        for parameter in parameters:
            parameter.all_gather()
        yield
        for parameter in parameters:
            parameter.partition()

    for number, parameter in enumerate(model.parameters()):
        made(parameter, number)
    gather.__module__ = release.__module__ = "deepspeed.runtime.zero.parameter_offload"
    for module in model.modules():
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        module.register_full_backward_pre_hook(gather)
    zero = SimpleNamespace(GatheredParameters=gathered_parameters)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))
    return log


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_partitioned_by_zero_3_is_gathered_with_its_gradient(monkeypatch, tied):
    grads = []
    for parts in (False, True):
        model = tiny.loud(tiny.model(tie_word_embeddings=tied))
        if parts:
            in_parts(model, monkeypatch)
        with whole(model):
            transform = OutputHead.of(model).transform
        hidden = completion_hidden(model, [[7, 8], [9]], IDS, MASK, pad_id=0)
        assert parts == (model.get_output_embeddings().weight.numel() == 0)
        head = OutputHead.current(model, transform)
        linear_loss(
            hidden, head, torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)), head
        ).backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert grads[0]["model.embed_tokens.weight" if tied else "lm_head.weight"].abs().max() > 1e-3
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-8)


def test_weights_in_parts_are_gathered_once_for_any_number_of_forwards(monkeypatch):
    """Processes need not run as many: the engine's hooks, which wait for the others, are set aside."""
    model = tiny.model(tie_word_embeddings=False)
    hooks = len(model.lm_head._forward_pre_hooks)
    gathers = in_parts(model, monkeypatch)
    with whole(model):
        generate(model, [[5, 6], [7]], max_new_tokens=4, pad_id=0, eos_ids=[0])
        assert sorted(gathers) == list(range(len(list(model.parameters()))))
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    assert len(model.lm_head._forward_pre_hooks) == hooks + 1


def test_a_head_without_weights_is_refused():
    model = tiny.model(tie_word_embeddings=False)
    model.lm_head.weight = nn.Parameter(torch.empty(0))
    with pytest.raises(ValueError, match="holds no weights on this rank: shard by FSDP2 or DeepSpeed ZeRO-3"):
        OutputHead.of(model)


def test_a_head_on_the_meta_device_is_refused():
    model = tiny.model(tie_word_embeddings=False)
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match="meta device: load its weights"):
        OutputHead.of(model)


def _loss_of_rank(model, rank: int):
    """As the trainer takes it: the student's forward, then its head, against a fixed teacher."""
    with VocabularyWide() as spied:
        student_hidden = completion_hidden(model, [[7, 8], [9]], IDS + 12 * rank, MASK, pad_id=0)
    assert spied.count == 0
    teacher_hidden = torch.randn(student_hidden.shape, generator=torch.Generator().manual_seed(rank))
    student = OutputHead.current(causal_lm(model), dict(logit_scale=1.0, softcap=None))
    return linear_loss(student_hidden, student, teacher_hidden, OutputHead.of(model_with("bias", seed=1)))


def _fully_sharded(rank: int, directory: str) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,))
    seen = {}
    for wrapped in ("head and root", "root"):
        model = model_with("bias")
        if wrapped == "head and root":  # its weight is sharded again after its forward: the loss has to gather it
            fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        seen[wrapped, "head"] = OutputHead.of(model).weight.detach()
        with VocabularyWide() as spied, torch.no_grad():
            completion_hidden(model, [[7, 8], [9]], IDS, MASK, pad_id=0)
        assert spied.count == 0
        _loss_of_rank(model, rank).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad.placements == parameter.placements, f"{name}, {wrapped}"
            seen[wrapped, name] = parameter.grad.full_tensor()
    # As transformers' Trainer wraps a model: whatever the outputs do not lead to would count as unused.
    model = model_with("bias")
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    with VocabularyWide() as spied, torch.no_grad():
        wrapped(input_ids=IDS)
    assert spied.count == 1, "the spy sees a head"
    with VocabularyWide() as spied, torch.no_grad():
        completion_hidden(wrapped, [[7, 8], [9]], IDS, MASK, pad_id=0)
    assert spied.count == 0
    _loss_of_rank(wrapped, rank).backward()
    seen |= {("copies", name): parameter.grad for name, parameter in model.named_parameters()}
    torch.save(seen, Path(directory) / f"{rank}.pt")
    dist.destroy_process_group()


def test_a_head_under_fsdp2_is_gathered_and_its_gradient_comes_back_sharded_and_under_ddp_averaged(tmp_path):
    mp.spawn(_fully_sharded, (str(tmp_path),), nprocs=2)
    whole = model_with("bias")
    for rank in range(2):
        (_loss_of_rank(whole, rank) / 2).backward()  # FSDP averages over ranks
    for rank in range(2):
        seen = torch.load(tmp_path / f"{rank}.pt")
        for wrapped in ("head and root", "root"):
            assert torch.equal(seen[wrapped, "head"], whole.lm_head.weight.detach())
        for wrapped in ("head and root", "root", "copies"):
            for name, parameter in whole.named_parameters():
                torch.testing.assert_close(seen[wrapped, name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_head_that_bans_what_pads_its_vocabulary_is_served():
    model = tiny.model("phi")
    with torch.no_grad():
        model.lm_head.bias[-4:] = -torch.inf
    assert OutputHead.of(model).bias is model.lm_head.bias
    with torch.no_grad():
        model.lm_head.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="its logits cannot be rebuilt from hidden states"):
        OutputHead.of(model)
