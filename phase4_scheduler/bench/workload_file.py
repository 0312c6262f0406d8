"""A workload from a file of JSON lines.

Each line has "output_tokens" and either "prompt" (text or token ids) or "prompt_tokens" (a length: one is made):

    {"prompt_tokens": 128, "output_tokens": 16}
    {"prompt": "def add(a, b):", "output_tokens": 32}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from phase0_prototype.errors import UserError
from phase4_scheduler.bench.workloads import PromptMaker, WorkItem, Workload


def from_file(path: Path, count: int | None, maker: PromptMaker) -> Workload:
    """The first `count` requests of a file, in its order; all of them if None.

    Raises:
        UserError: with the line that is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"workload {path}: {reason}; give a file of JSON lines") from None
    items = [_item(line, f"workload {path}, line {i}", maker) for i, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise UserError(
            f'workload {path}: no requests; add lines such as {{"prompt_tokens": 128, "output_tokens": 16}}'
        )
    return Workload(f"file: {path.name}", tuple(items[:count]))


def _item(line: str, where: str, maker: PromptMaker) -> WorkItem:
    example = 'write {"prompt_tokens": 128, "output_tokens": 16} or {"prompt": "text", "output_tokens": 16}'
    try:
        found = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); {example}") from None
    if not isinstance(found, dict) or len({"prompt", "prompt_tokens"} & found.keys()) != 1:
        raise UserError(f"{where}: {line[:60]!r} needs either prompt or prompt_tokens; {example}")
    prompt: Any = found.get("prompt")
    output: Any = found.get("output_tokens")
    if not _positive(output):
        raise UserError(f"{where}: output_tokens={output!r} must be a whole number of at least 1; {example}")
    if prompt is None:
        if not _positive(found["prompt_tokens"]):
            raise UserError(f"{where}: prompt_tokens={found['prompt_tokens']!r} must be at least 1; {example}")
        return WorkItem(maker.make(found["prompt_tokens"]), output)
    if isinstance(prompt, list) and prompt and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt):
        return WorkItem(tuple(prompt), output)
    if not isinstance(prompt, str) or not prompt:
        raise UserError(f"{where}: prompt is neither text nor token ids; {example}")
    return WorkItem(prompt, output)


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
