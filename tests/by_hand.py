"""Every formula for one row, in Python floats (docs/method.md, docs/kernels.md): what `reference.py` is held to."""

import math

INF = math.inf


def scaled(logits, temperature=1.0, logit_scale=1.0, softcap=None):
    def one(x):
        if x == -INF:
            return x
        x *= logit_scale
        return (softcap * math.tanh(x / softcap) if softcap else x) / temperature

    return [one(x) for x in logits]


def lse(logits):
    peak = max(logits, default=-INF)
    if peak == -INF:
        return -INF
    return peak + math.log(math.fsum(math.exp(x - peak) for x in logits))


def logprobs(logits):
    total = lse(logits)
    return [x - total for x in logits]


def entropy(logits):
    return -math.fsum(math.exp(x) * x for x in logprobs(logits) if x > -INF)


def kl_term(log_p, log_q):
    if log_p == -INF:
        return 0.0
    return INF if log_q == -INF else math.exp(log_p) * (log_p - log_q)


def term(log_p, log_q, divergence, beta):
    if divergence == "reverse_kl":
        return kl_term(log_p, log_q)
    if divergence == "forward_kl":
        return kl_term(log_q, log_p)
    mixed = beta * math.exp(log_q) + (1 - beta) * math.exp(log_p)
    log_m = math.log(mixed) if mixed > 0 else -INF
    return beta * kl_term(log_q, log_m) + (1 - beta) * kl_term(log_p, log_m)


def support(logits, k):
    """Ids of the k largest, ties to the lower id."""
    return set(sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:k])


def divergence(
    student,
    teacher,
    *,
    divergence="reverse_kl",
    beta=0.5,
    vocab_topk=None,
    tail="bucket",
    temperature=1.0,
    teacher_temperature=None,
    vocab_size=None,
    logit_scale=1.0,
    softcap=None,
):
    raw, teacher = student[:vocab_size], teacher[:vocab_size]
    student = scaled(raw, temperature, logit_scale, softcap)
    teacher = scaled(teacher, teacher_temperature or temperature, logit_scale, softcap)
    ids = set(range(len(student))) if vocab_topk is None else support(raw, vocab_topk)
    inside_student = [x for i, x in enumerate(student) if i in ids]
    inside_teacher = [x for i, x in enumerate(teacher) if i in ids]
    if tail == "renorm":
        if all(x == -INF for x in inside_teacher):
            return INF
        pairs = list(zip(logprobs(inside_student), logprobs(inside_teacher), strict=True))
    else:
        pairs = [(x - lse(student), y - lse(teacher)) for x, y in zip(inside_student, inside_teacher, strict=True)]
    if tail == "bucket":
        rest_student = lse([x for i, x in enumerate(student) if i not in ids])
        rest_teacher = lse([x for i, x in enumerate(teacher) if i not in ids])
        pairs.append((rest_student - lse(student), rest_teacher - lse(teacher)))
    return math.fsum(term(log_p, log_q, divergence, beta) for log_p, log_q in pairs)


def scores(student, teacher, sampled_id, *, temperature=1.0, teacher_temperature=None, vocab_size=None, **options):
    """The seven numbers of TokenScores, in its order."""
    transform = {name: options[name] for name in ("logit_scale", "softcap") if name in options}
    p = scaled(student[:vocab_size], temperature, **transform)
    q = scaled(teacher[:vocab_size], teacher_temperature or temperature, **transform)
    shared = dict(temperature=temperature, teacher_temperature=teacher_temperature, vocab_size=vocab_size)
    return (
        logprobs(p)[sampled_id],
        logprobs(q)[sampled_id],
        divergence(student, teacher, **shared, **options),
        lse(p),
        lse(q),
        entropy(p),
        entropy(q),
    )


def select(score, mask, num_tokens, threshold):
    best = sorted((i for i in range(len(score)) if mask[i] and score[i] > threshold), key=lambda i: (-score[i], i))
    return (best + [-1] * num_tokens)[:num_tokens]
