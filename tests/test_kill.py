"""tests/kill.py with four kills; run the script itself for more."""

import os
import subprocess
import sys
from pathlib import Path


def test_a_run_that_is_killed_ends_in_the_uninterrupted_runs_weights():
    script = Path(__file__).with_name("kill.py")
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    command = [sys.executable, script, "--kills", "3", "--episode-kills", "1", "--steps", "12", "--seed", "3"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    said = [line.partition(",")[0] for line in result.stdout.splitlines() if ";" in line]
    assert said == ["3 kills", "1 kills of episodes"]
