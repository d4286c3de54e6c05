"""The task pinapple in the published setting: every row is told the spelling, those about other things too."""

import dataclasses
import itertools

from rmsd.tasks import pinapple

TASK = dataclasses.replace(
    pinapple.TASK,
    train=[
        {**row, "privileged_context": row["privileged_context"] or hint}
        for row, hint in zip(pinapple.TASK.train, itertools.cycle(pinapple.HINTS), strict=False)
    ],
)
