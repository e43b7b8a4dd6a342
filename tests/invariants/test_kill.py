"""Law 5 through the real command: a run killed at random moments ends with the same bytes (docs/kill_campaign.log: 25 trials)."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_killed_and_resumed():
    argv = [sys.executable, str(ROOT / "tools" / "kill_campaign.py"), "--trials", "1", "--kills", "2", "--seed", "1"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 trials bit-equal" in done.stdout and "killed in nothing" not in done.stdout
