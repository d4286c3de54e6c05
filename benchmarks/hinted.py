"""The task pinapple with the spelling told on every row, those about other things too. Whether the publication tells it
there, nothing that we can read says."""

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
