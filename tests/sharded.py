"""The ranks that tests/test_distributed.py looks at: four gloo processes, started once, in groups of 1, 2 and 4."""

import math
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_linear import Largest

from rmsd_kernels import vocab_parallel_linear_token_divergence, vocab_parallel_linear_token_scores

INF, NAN = math.inf, math.nan
N, V, H, H2 = 40, 120, 8, 6
SHARDS = {1: (V,), 2: (77, 43), 4: (50, 3, 40, 27)}  # 3 is less than any k here
THIRD = slice(50, 53)  # the second of four shards
ROWS = torch.cat([torch.arange(39, 2, -1), torch.tensor([-1, 0])])  # of one or two, plain torch's error may be luck
UPSTREAM = torch.linspace(-1, 3, len(ROWS))
NAMES = ("student_hidden", "student_weight", "student_bias")


def base(dtype=torch.float32) -> dict:
    generator = torch.Generator().manual_seed(0)
    shapes = dict(
        student_hidden=(N, H),
        student_weight=(V, H),
        teacher_hidden=(N, H2),
        teacher_weight=(V, H2),
        student_bias=(V,),
        teacher_bias=(V,),
    )
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def bf16():
    return base(torch.bfloat16)


def fp64():
    return base(torch.float64)


def nearly_equal():
    made = base()
    made["teacher_hidden"], made["teacher_bias"] = made["student_hidden"].clone(), made["student_bias"].clone()
    made["teacher_weight"] = made["student_weight"] + 1e-4 * torch.randn(V, H, generator=torch.Generator())
    return made


def saturated():
    made = base()
    for role, seed in (("student", 1), ("teacher", 2)):
        made[f"{role}_bias"] = 30 * torch.randn(V, generator=torch.Generator().manual_seed(seed)).sign()
    return made


def one_shard_rules():
    """The third of four shards has mass e^-300 beside the first."""
    made = base()
    made["student_bias"][:50] += 150.0
    made["student_bias"][THIRD] -= 150.0
    return made


def tied():
    """Small whole numbers: hundreds of exact ties, across every shard."""
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randint(-1, 2, tensor.shape, generator=generator).float() for name, tensor in base().items()}


def banned(student=None, teacher=None, value=-INF):
    def make():
        made = base()
        for role, where in (("student", student), ("teacher", teacher)):
            if where is not None:
                made[f"{role}_bias"][where] = value
        return made

    return make


def teacher_banned_where_student_underflows():
    made = base()
    made["student_bias"][THIRD], made["teacher_bias"][51] = -900.0, -INF  # e^-900 is 0 in fp64, too
    return made


def nan_row():
    made = base()
    made["student_hidden"][39, 2] = NAN
    return made


def padded():
    made = base()
    made["student_bias"][52:], made["teacher_bias"][52:] = NAN, INF
    return made


MADE = {
    "base": base, "bf16": bf16, "fp64": fp64, "nearly_equal": nearly_equal, "saturated": saturated, "tied": tied,
    "one_shard_rules": one_shard_rules, "padded": padded, "nan_row": nan_row,
    "student_shard_banned": banned(student=THIRD),
    "teacher_shard_banned": banned(teacher=THIRD),
    "both_shards_banned": banned(student=THIRD, teacher=THIRD),
    "other_shards_banned": banned(student=slice(53, 93), teacher=THIRD),
    "all_but_a_shard_banned": banned(student=slice(53, None), teacher=slice(53, None)),
    "all_banned": banned(student=slice(None)),
    "nan_in_a_shard": banned(teacher=slice(100, 101), value=NAN),
    "inf_in_a_shard": banned(student=slice(51, 52), value=INF),
    "teacher_banned_where_student_underflows": teacher_banned_where_student_underflows,
}  # fmt: skip


def cases() -> dict[str, tuple[str, dict]]:
    """name -> (inputs, options)."""
    made = {}
    for inputs in MADE:
        for divergence in ("reverse_kl", "forward_kl", "jsd"):
            for tail in (None, "drop", "bucket", "renorm"):
                options = dict(divergence=divergence, beta=0.3)
                if tail:
                    options |= dict(vocab_topk=10, tail=tail)
                if inputs == "padded":
                    options |= dict(vocab_size=52)
                made[f"{inputs}-{divergence}-{tail}"] = inputs, options
    transform = dict(logit_scale=0.5, softcap=4.0, temperature=0.7, teacher_temperature=1.3, workspace_mb=0.012)
    for name, (inputs, options) in list(made.items()):
        if inputs in ("base", "tied", "student_shard_banned", "inf_in_a_shard"):
            made[f"transformed-{name}"] = inputs, dict(options, **transform)
    for k in (60, V - 1, V, 10 * V):
        for tail in ("drop", "bucket", "renorm"):
            made[f"base-k{k}-{tail}"] = "base", dict(vocab_topk=k, tail=tail)
    for backend in ("torch", "cpu"):
        for name in ("reverse_kl", "forward_kl", "jsd"):
            made[f"base-{name}-{backend}"] = "base", dict(divergence=name, backend=backend)
    return made


def worlds(name: str) -> list[int]:
    """How many shards a case is split into: what hurts is made for four, and one and two take the common road."""
    everywhere = name.removeprefix("transformed-").split("-")[0] in ("base", "tied", "fp64", "padded", "nan_row")
    return list(SHARDS) if everywhere else [4]


def sampled_ids(limit: int = V) -> torch.Tensor:
    return torch.randint(limit, (N,), generator=torch.Generator().manual_seed(1))


def shard_of(made: dict, rank: int, world: int) -> dict:
    start = sum(SHARDS[world][:rank])
    part = slice(start, start + SHARDS[world][rank])
    return {name: tensor.clone() if "hidden" in name else tensor[part].clone() for name, tensor in made.items()}


def positional(made: dict) -> tuple[list, dict]:
    made = dict(made)
    return [made.pop(n) for n in ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")], made


def _run_case(inputs: str, options: dict, group, rank: int, world: int) -> dict:
    leaves = shard_of(MADE[inputs](), rank, world)
    for name in NAMES:
        leaves[name].requires_grad_()
    tensors, biases = positional(leaves)
    scoring = {name: value for name, value in options.items() if name not in ("vocab_topk", "tail")}
    ids = sampled_ids(options.get("vocab_size", V))
    scores = vocab_parallel_linear_token_scores(*tensors, ids, group=group, **biases, **scoring)
    result = vocab_parallel_linear_token_divergence(*tensors, rows=ROWS, group=group, **biases, **options)
    grads = torch.autograd.grad(result, [leaves[name] for name in NAMES], UPSTREAM.to(result.dtype))
    return dict(scores=tuple(scores), divergence=result.detach(), grads=grads)


class Traffic:
    """Counts what this rank gives to each collective, and how often."""

    def __init__(self):
        self.calls: list[tuple[str, int]] = []

    def __enter__(self):
        self.originals = dict(all_gather=dist.all_gather, all_reduce=dist.all_reduce)
        dist.all_gather = self._counting("all_gather", given=1)
        dist.all_reduce = self._counting("all_reduce", given=0)
        return self.calls

    def _counting(self, name, given):
        def call(*args, **kwargs):
            self.calls.append((name, args[given].numel() * args[given].element_size()))
            return self.originals[name](*args, **kwargs)

        return call

    def __exit__(self, *_):
        for name, original in self.originals.items():
            setattr(dist, name, original)


TRAFFIC = {
    "scores": (vocab_parallel_linear_token_scores, dict()),
    "scores-jsd": (vocab_parallel_linear_token_scores, dict(divergence="jsd")),
    "divergence": (vocab_parallel_linear_token_divergence, dict()),
    "divergence-jsd": (vocab_parallel_linear_token_divergence, dict(divergence="jsd")),
    "divergence-topk": (vocab_parallel_linear_token_divergence, dict(vocab_topk=4)),
}


def _traffic(name: str, group, rank: int, world: int, hidden_needs_grad: bool) -> list:
    function, options = TRAFFIC[name]
    leaves = shard_of(base(), rank, world)
    leaves["student_hidden"].requires_grad_(hidden_needs_grad)
    leaves["student_weight"].requires_grad_()
    tensors, biases = positional(leaves)
    if "scores" in name:
        tensors.append(sampled_ids())
    with Traffic() as calls:
        result = function(*tensors, group=group, **biases, **options)
        if "scores" not in name:
            result.sum().backward()
    return calls


def _spoiled(name: str, rank: int, tensors: list, options: dict) -> None:
    """Makes one argument bad, on rank 1 alone where it can be bad on one rank."""
    alone = rank == 1
    if name == "student_weight" and alone:
        tensors[1] = tensors[1][:, :-1]
    elif name == "teacher_weight" and alone:
        tensors[3] = tensors[3][:-1]
    elif name == "teacher_hidden" and alone:
        tensors[2] = tensors[2].half()
    elif name == "student_bias" and alone:
        options["student_bias"] = options["student_bias"][1:]
    elif name == "sampled_ids" and alone:
        tensors[4][3] = V
    elif name == "sampled_ids_negative" and alone:
        tensors[4][3] = -1
    elif name == "temperature" and alone:
        options["temperature"] = 2.0
    elif name == "student_hidden" and alone:
        tensors[0], tensors[2], tensors[4] = (tensor[1:] for tensor in (tensors[0], tensors[2], tensors[4]))
    elif name == "backend" and alone:
        options["backend"] = "cuda"
    elif name == "vocab_size":
        options["vocab_size"] = V + 1
    elif name == "divergence":
        options["divergence"] = "kl"


SPOILED = (
    "student_weight",
    "teacher_weight",
    "teacher_hidden",
    "student_bias",
    "sampled_ids",
    "sampled_ids_negative",
    "temperature",
    "student_hidden",
    "backend",
    "vocab_size",
    "divergence",
)


def _refusal(name: str, group, rank: int) -> tuple[str, str]:
    tensors, options = positional(shard_of(base(), rank, 2))
    tensors.append(sampled_ids())
    _spoiled(name, rank, tensors, options)
    try:
        vocab_parallel_linear_token_scores(*tensors, group=group, **options)
    except (TypeError, ValueError) as error:
        return type(error).__name__, str(error)
    return "none", ""


def _no_rows(group, rank: int, world: int) -> tuple:
    leaves = shard_of(base(), rank, world)
    leaves["student_hidden"].requires_grad_()
    tensors, biases = positional(leaves)
    result = vocab_parallel_linear_token_divergence(*tensors, rows=ROWS[:0], group=group, **biases)
    (grad,) = torch.autograd.grad(result.sum(), tensors[0])
    tensors = [t[:0].detach() if i in (0, 2) else t for i, t in enumerate(tensors)]
    scores = vocab_parallel_linear_token_scores(*tensors, sampled_ids()[:0], group=group, **biases)
    return result.detach(), grad, scores.divergence


def _largest(group) -> int:
    """Elements of the largest tensor that 600 rows of 2,000 logits need in a workspace of 1 MB."""
    hidden, weight = torch.randn(600, 4, requires_grad=True), torch.randn(2000, 4, requires_grad=True)
    heads = hidden, weight, hidden.detach(), weight.detach()
    with Largest() as largest:
        vocab_parallel_linear_token_scores(*heads, torch.zeros(600, dtype=torch.int64), group=group, workspace_mb=1)
        for options in (dict(), dict(divergence="jsd"), dict(vocab_topk=20, tail="bucket")):
            result = vocab_parallel_linear_token_divergence(*heads, group=group, workspace_mb=1, **options)
            result.sum().backward()
    return largest.numel


def _worker(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=4)
    groups = {1: dist.new_group([0]), 2: dist.new_group([0, 1]), 4: None}  # None: the default group
    seen = {}
    for world, group in groups.items():
        if rank >= world:
            continue
        for name, (inputs, options) in cases().items():
            if world not in worlds(name):
                continue
            seen[world, name] = _run_case(inputs, options, group, rank, world)
        for name in TRAFFIC:
            seen[world, "traffic", name] = _traffic(name, group, rank, world, hidden_needs_grad=True)
        seen[world, "traffic", "frozen decoder"] = _traffic("divergence", group, rank, world, hidden_needs_grad=False)
        seen[world, "no rows"] = _no_rows(group, rank, world)
    if rank == 0:
        seen["largest"] = _largest(groups[1])
    if rank < 2:
        for name in SPOILED:
            seen["refused", name] = _refusal(name, groups[2], rank)
    else:
        tensors, biases = positional(shard_of(base(), rank, 4))
        try:
            vocab_parallel_linear_token_scores(*tensors, sampled_ids(), group=groups[2], **biases)
        except ValueError as error:
            seen["outsider"] = str(error)
    torch.save(seen, Path(directory) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run(directory: Path) -> list[dict]:
    """What each of the four ranks saw."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.spawn(_worker, (str(directory),), nprocs=4)
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(4)]
