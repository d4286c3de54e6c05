"""Will a recipe's run teach anything? Said before it is started, from the model's own answers: `rmsd preflight`.

What a run can teach is what its teacher does once it is told; how much there is to learn shows in the gap between the
two readings, whose size before training predicts what distillation gains (arXiv 2605.30070)."""

from dataclasses import dataclass, field
from statistics import fmean

from ..judge import Question
from .probe import Probe, edit, spread
from .recipe import Recipe

FEW_CONTEXTS = 16  # phrasings that are asked about one by one; where rows differ in more, each is asked its own prompt
TEACHES = 0.1  # of answers, more than untold, over all phrasings: a teacher that obeys in less cannot teach
WORKS = 0.2  # the same, of one phrasing
LEAK = 0.1  # of answers about something else, that a told teacher may spoil before anchors are called for
SHOWN = 6  # candidates of each judge


@dataclass
class Findings:
    """What a verdict follows from; all shares are of answers."""

    told: list[float] = field(default_factory=list)  # that pass every grader, by phrasing of the context
    untold: float = 0.0
    leaks: float | None = None  # told, before prompts about something else
    anchors: int = 0  # rows
    gap: float = 0.0  # nats a token, the mean of its size over the candidates and 0 elsewhere


def preflight(recipe: Recipe, prompts: int = 8) -> str:
    """What to print: how often the told teacher does what is wanted, the gap, what each judge keeps, what a run costs,
    and a verdict. `prompts` are asked under each phrasing of the context, and as many rows are trained on for a step.
    """
    if not recipe.judge.replay:  # which answers from a cache that is there; others would fill theirs
        recipe = recipe.model_copy(update={"judge": recipe.judge.model_copy(update={"cache": None})})
    probe = Probe(recipe)
    found = Findings(anchors=len(probe.rows) - len(probe.told))
    sections = [f"preflight of {recipe.model}"]
    if probe.task:
        sections.append(_obedience(probe, prompts, found))
    sections.append(f"anchors: {found.anchors} of {len(probe.rows)} rows, whose teacher is told nothing")
    rows = spread(probe.told, prompts)
    questions, logged, seconds = probe.step(rows)  # of answers that have a candidate
    sections += [_gap(probe, questions, len(rows), logged, found), _judged(probe, questions, len(rows))]
    sections.append(_contrasts(probe))
    sections += [_cost(probe, seconds), *(f"note: {note}" for note in probe.notes), "\n".join(verdict(found))]
    return "\n\n".join(filter(None, sections))


def verdict(found: Findings) -> list[str]:
    """In plain words, the answer first."""
    if not found.told:
        lines = [
            f"verdict: no task, so nothing says whether the teacher obeys; the gap is {found.gap:.2f} nats a token.",
            "  Read above whether what it would change is what you want, or give the recipe a task with a grader.",
        ]
    else:
        lines = _of_teacher(found)
    if found.leaks is not None and found.leaks > LEAK and not found.anchors:
        lines.append(
            f"  No anchors: told, it does so in {found.leaks:.0%} of answers about other things too, and that will be "
            "taught as well. Add rows with an empty privileged_context."
        )
    return lines


def _of_teacher(found: Findings) -> list[str]:
    shares, mean = found.told, fmean(found.told)
    obeys = f"The told teacher obeys in {mean:.0%} of answers (untold {found.untold:.0%})"
    if found.untold >= 0.9:
        return [f"verdict: no. The student does it untold in {found.untold:.0%} of answers: there is nothing to teach."]
    working = sorted((i for i, share in enumerate(shares) if share - found.untold >= WORKS), key=lambda i: -shares[i])
    named = ", ".join(f"{i + 1} ({shares[i]:.0%})" for i in working)
    if mean - found.untold < TEACHES:
        lines = [f"verdict: no. {obeys}: training cannot teach it. Word the context otherwise."]
        return [*lines, f"  It obeys phrasing {named}: word all rows as that."] if working else lines
    if len(working) == len(shares):
        lines = [f"verdict: yes. {obeys}."]
    elif not working:
        lines = [f"verdict: hardly. {obeys}: word the context otherwise."]
    else:
        lines = [f"verdict: yes, by {len(working)} of {len(shares)} phrasings. {obeys}."]
        lines.append(f"  It obeys phrasing {named}. The others teach little: word their rows as those.")
    if max(shares) < 0.75:
        lines.append(f"  {max(shares):.0%} is a ceiling: a continuation (train.continuation_steps) raises it.")
    return lines


# ---- what is shown -------------------------------------------------------------------------------------------------


def _obedience(probe: Probe, prompts: int, found: Findings) -> str:
    """A row a phrasing, a column a grader."""
    task = probe.task
    if task.requests:
        return _solved(probe, spread(task.requests, prompts), found)
    contexts = list(dict.fromkeys(row["privileged_context"] for row in probe.told if not row.get("teacher_prompt")))
    if 0 < len(contexts) <= FEW_CONTEXTS:
        asked = spread(task.target_prompts, prompts)
        groups = {context: _under(probe, asked, [context]) for context in contexts}
    else:
        some = spread(probe.told, prompts)
        asked, groups = [row["prompt"] for row in some], {"each row's own": list(map(probe.told_prompt, some))}
    width = max(len("0.00"), *map(len, task.graders)) + 2
    lines = [f"obedience: share of greedy answers, {len(asked)} prompts a phrasing"]
    lines.append("   " + "".join(f"{name:>{width}}" for name in task.graders))
    for number, (name, prompts_of) in enumerate([("untold", asked), *groups.items()]):
        passed = [[bool(grader(answer)) for grader in task.graders.values()] for answer in probe.answers(prompts_of)]
        obeyed = fmean(map(all, passed))
        if number:
            found.told.append(obeyed)
        else:
            found.untold = obeyed
        cells = "".join(f"{fmean(column):>{width}.2f}" for column in zip(*passed, strict=True))
        lines.append(f"{number or '':>3}{cells}  {name}")
    if contexts and task.unrelated_prompts:
        others = spread(task.unrelated_prompts, 2 * prompts)
        found.leaks = fmean(map(bool, map(task.leaks, probe.answers(_under(probe, others, contexts)))))
        lines.append(f"told, before {len(others)} prompts about something else: {found.leaks:.2f} do it all the same")
    return "\n".join(lines)


def _solved(probe: Probe, requests: list[dict], found: Findings) -> str:
    """Of a task with an environment: what the model solves of its held-out requests."""
    solving = probe.solving(requests)
    lines = [f"obedience: share of {len(requests)} held-out requests that are solved, greedily"]
    for told in (False, True):
        metrics = solving(probe.model, "greedy", told=told)
        solved, turns, errors = (metrics[f"{name}_greedy"] for name in ("solved", "turns", "tool_errors"))
        whom = "told" if told else "untold"
        lines.append(f"{solved:>8.2f}  {whom}, in {turns:.1f} turns, {errors:.0%} of calls in error")
        if told:
            found.told.append(solved)
        else:
            found.untold = solved
    return "\n".join(lines)


def _under(probe: Probe, prompts: list, contexts: list[str]) -> list:
    """The prompts as the teacher reads them, the contexts in turn."""
    rows = [{"prompt": prompt, "privileged_context": contexts[i % len(contexts)]} for i, prompt in enumerate(prompts)]
    return list(map(probe.told_prompt, rows))


def _gap(probe: Probe, questions: list[Question], answers: int, logged: dict, found: Findings) -> str:
    of_answers = [sorted((abs(c.gap) for c in question.candidates), reverse=True) for question in questions]
    sizes, most = [size for answer in of_answers for size in answer], probe.args.num_kept
    tokens = int(logged["rollout_tokens"])
    found.gap = sum(sizes) / max(tokens, 1)
    largest = sum(sum(answer[:most]) for answer in of_answers) / max(sum(sizes), 1e-9)
    return (
        f"gap: {found.gap:.2f} nats a token, of {tokens} tokens in {answers} answers untold\n"
        f"  {len(sizes)} candidates of {probe.args.min_gap:g} nats or more (train.min_gap); "
        f"{sum(s > 0.5 for s in sizes)} above 0.5, {sum(s > 2.0 for s in sizes)} above 2; "
        f"the largest {most} of each answer hold {largest:.0%} of it"
    )


def _judged(probe: Probe, questions: list[Question], answers: int) -> str:
    """What each judge keeps, as text."""
    lines = []
    for name, judge in probe.judges().items():
        try:
            answered = judge(questions)
        except (ConnectionError, LookupError) as error:
            probe.notes.append(f"{name}: {error}")
            continue
        kept = [(question, at) for question, answer in zip(questions, answered, strict=True) for at in answer]
        lines.append(f"judge {name}: keeps {len(kept)}, in {sum(map(bool, answered))} of {answers} answers")
        lines += [f"    {edit(question, position)}" for question, position in spread(kept, SHOWN)]
    return "\n".join(lines)


def _contrasts(probe: Probe) -> str:
    if not probe.contrasts:
        return ""
    origins = ", ".join(f"{count} rows by {origin}" for origin, count in probe.contrasts.origins.items())
    pairs = {row["privileged_context"]: probe.contrasts.context(row) for row in probe.told}
    shown = [f"    {context!r:.100} -> {contrast!r:.100}" for context, contrast in list(pairs.items())[:3]]
    return "\n".join([f"contrast contexts: {origins}", *shown])


def _cost(probe: Probe, seconds: float) -> str:
    args = probe.args
    step_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    rollouts = args.max_steps * step_size if args.max_steps > 0 else int(len(probe.rows) * args.num_train_epochs)
    return (
        f"cost here: {seconds:.1f} s a rollout, written, scored and trained on; about {seconds * rollouts / 60:,.0f} "
        f"minutes for the run's {rollouts:,}, evaluation apart; dry_run=true plans the rest"
    )
