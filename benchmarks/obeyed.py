"""The task pinapple with the one phrasing of its hint that Qwen2.5-Coder-0.5B-Instruct obeys, as `rmsd preflight` finds
(in 38% of its answers, where it obeys all eight in 6%). Rows about other things are anchors."""

import dataclasses

from rmsd.tasks import pinapple

TASK = dataclasses.replace(
    pinapple.TASK,
    train=[
        {**row, "privileged_context": pinapple.HINTS[0], "contrast_context": pinapple.CONTRASTS[0]}
        if row["privileged_context"]
        else row
        for row in pinapple.TASK.train
    ],
)
