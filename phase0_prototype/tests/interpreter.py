"""Runs a script in Triton's interpreter, which must be chosen before Triton is imported: in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


def interpreted(script: str, *arguments: str, timeout: float = 240) -> dict[str, Any]:
    """The JSON object that the script prints last. It must work in float32 or float16: bfloat16 is silently wrong."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))
