"""`write_picture`: one recorded answer as an SVG, its candidates tinted and the kept tokens outlined."""

import textwrap
from pathlib import Path
from xml.sax.saxutils import escape

from .runs import Run, number, read_run

THEMES = {
    "light": dict(paper="#ffffff", ink="#1f2328", faint="#59636e", tint="#0969da", kept="#bc4c00", rule="#d1d9e0"),
    "dark": dict(paper="#0d1117", ink="#e6edf3", faint="#9198a1", tint="#4493f8", kept="#f0883e", rule="#3d444d"),
}
WIDTH, MARGIN = 820, 20
SIZE, ADVANCE = 15, 9  # of the answer's monospaced text, px; a character is stretched to its advance
LABEL_SIZE, LABEL_ADVANCE = 11, 6.6
LINE, TEXT_LINE, MOST_LINES = 46, 20, 12
SATURATED = 4.0  # nats of gap at which a candidate's tint is full


def write_picture(run_dir: str | Path, output: str | Path, *, theme: str = "light", step: int | None = None) -> Path:
    """Draws the answer of the run, or of its `step`, in which a kept token's gap is the largest.

    Raises:
        FileNotFoundError, ValueError: in one line; no such run, theme, or answer with a kept token.
    """
    if theme not in THEMES:
        raise ValueError(f"theme must be one of {', '.join(THEMES)}, not {theme!r}")
    run = read_run(run_dir)
    output = Path(output)
    output.write_text(_svg(_telling(run, step), THEMES[theme]), encoding="utf-8", errors="xmlcharrefreplace")
    return output


def _telling(run: Run, step: int | None) -> dict:
    told = [r for r in run.rollouts if r["kept"] and r["privileged_context"].strip() and step in (None, r["step"])]
    if not told:
        where = run.path if step is None else f"step {step} of {run.path}"
        raise ValueError(f"{where} has no recorded answer with a kept token: nothing to draw")
    return max(told, key=lambda rollout: max(_gap(rollout, position) for position in rollout["kept"]))


def _gap(rollout: dict, position: int) -> float:
    values = [number(rollout[name][position]) for name in ("student_logprob", "teacher_logprob")]
    return 0.0 if None in values else abs(values[1] - values[0])


def _svg(rollout: dict, theme: dict[str, str]) -> str:
    y = MARGIN + SIZE
    parts = []
    for head, text in (("Asked", rollout["prompt"]), ("Only the teacher is told", rollout["privileged_context"])):
        lines = textwrap.wrap(_shown(text), 68) or [""]
        for i, line in enumerate(lines[:3]):
            if i == 0:
                parts.append(_text(MARGIN, y, head, theme["faint"], family="sans"))
            parts.append(_text(MARGIN + 180, y, line, theme["ink"], family="sans"))
            y += TEXT_LINE
    y += 14
    drawn, y = _tokens(rollout, theme, y)
    parts += drawn
    y += 8
    legend = {
        "candidate: here teacher and student differ most": False,
        "kept by the judge, so trained on; below it, what the teacher would write": True,
    }
    for words, kept in legend.items():
        parts.append(_box(MARGIN, y, 26, theme, 0.5, kept))
        parts.append(_text(MARGIN + 36, y + 15, words, theme["faint"], family="sans"))
        y += 26
    candidates, tokens, kept = (len(rollout[name]) for name in ("candidates", "tokens", "kept"))
    title = f"An answer of step {rollout['step']}: {candidates} of {tokens} tokens are candidates, {kept} kept"
    y += 6
    parts.append(_text(MARGIN, y + 12, f"{title}. The rest gets no gradient.", theme["faint"], family="sans"))
    height = y + 12 + MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img">',
            f"<title>{escape(title)}</title>",
            "<style>.sans{font:14px system-ui,sans-serif}.mono{font:15px ui-monospace,Menlo,Consolas,monospace}"
            ".small{font:11px ui-monospace,Menlo,Consolas,monospace}</style>",
            f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:g}" rx="8" fill="{theme["paper"]}" '
            f'stroke="{theme["rule"]}"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _tokens(rollout: dict, theme: dict[str, str], top: float) -> tuple[list[str], float]:
    """The answer's tokens in lines, and where the last line ends."""
    parts, x, y = [], MARGIN, top
    candidates, kept = set(rollout["candidates"]), set(rollout["kept"])
    for position, token in enumerate(rollout["tokens"]):
        text = _shown(token)
        wanted = rollout.get("preferred", {}).get(str(position)) if position in kept else None
        label = f"\u2192{_shown(wanted).strip()}" if isinstance(wanted, str) else ""
        width = max(len(text) * ADVANCE, len(label) * LABEL_ADVANCE) + 2
        if x > MARGIN and x + width > WIDTH - MARGIN:
            x, y = MARGIN, y + LINE
            if y >= top + MOST_LINES * LINE:
                parts.append(_text(x, y + 15, "\u2026", theme["faint"], family="mono"))
                break
        if position in candidates:
            strength = 0.1 + 0.5 * min(1.0, _gap(rollout, position) / SATURATED)
            parts.append(_box(x, y, width, theme, strength, position in kept))
        parts.append(_text(x + 1, y + 15, text, theme["ink"], family="mono", advance=ADVANCE))
        if label:
            parts.append(_text(x + 1, y + 33, label, theme["kept"], family="small", advance=LABEL_ADVANCE))
        x += width + 1
    return parts, y + LINE


def _box(x: float, y: float, width: float, theme: dict[str, str], strength: float, kept: bool) -> str:
    outline = f' stroke="{theme["kept"]}" stroke-width="2"' if kept else ""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="20" rx="3" fill="{theme["tint"]}" '
        f'fill-opacity="{strength:.2f}"{outline}/>'
    )


def _text(x: float, y: float, text: str, colour: str, *, family: str, advance: float | None = None) -> str:
    """`advance`: width of a character; boxes then fit whatever font the reader has."""
    length = f' textLength="{len(text) * advance:g}" lengthAdjust="spacingAndGlyphs"' if advance and text else ""
    body = escape(text)
    return f'<text x="{x:g}" y="{y:g}" class="{family}" fill="{colour}" xml:space="preserve"{length}>{body}</text>'


def _shown(text: str) -> str:
    """One line of printable characters: XML has no place for most of the others."""
    text = text.replace("\n", "\u21b5").replace("\t", " ")
    return "".join(c if c.isprintable() else "\ufffd" for c in text)
