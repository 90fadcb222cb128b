"""examples/plain_decoder.py runs as it stands and keeps its promises."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_example_runs():
    script = ROOT / "examples" / "plain_decoder.py"
    assert "transformers" not in script.read_text().split('"""')[2]
    done = subprocess.run([sys.executable, "-P", str(script)], capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert "budget=1.0: 300 of 300 tokens equal the model's" in out
    assert out.count("prefill  new returned as the cache BHTD") == 2
    assert "declined" not in out.replace("0 declined", "")
    whole, held = (float(share) for share in re.findall(r"without kvpass: ([\d.]+)%", out))
    assert 99.5 < whole < 102.6
    assert 19.5 < held < 20.7
    assert "policy h2o, budget 0.2" in out
