"""tests/kill.py with three kills; run the script itself for ten."""

import os
import subprocess
import sys
from pathlib import Path


def test_a_run_killed_three_times_ends_in_the_uninterrupted_runs_weights():
    script = Path(__file__).with_name("kill.py")
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    command = [sys.executable, script, "--kills", "3", "--steps", "16", "--seed", "3"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines()[-1].startswith("3 kills,")
