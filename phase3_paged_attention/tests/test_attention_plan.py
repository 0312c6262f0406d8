"""Plans of the triton backend: a captured step of some lengths serves every step of as many sequences."""

from __future__ import annotations

import importlib.util

import pytest

from phase0_prototype.tests.interpreter import interpreted

SCRIPT = """
import json, random, sys
import torch
torch.set_num_threads(1)
from module0_profiling.course import parts
from module0_profiling.course.parts import Use
from phase0_prototype.attention import AttentionSpec
from phase0_prototype.batch import Batch
from phase0_prototype.step import ScheduledRequest, Step
from phase0_prototype.request import Request
from phase0_prototype.sampling_params import SamplingParams
from phase3_paged_attention.attention import TritonAttention
from phase3_paged_attention.kernels import reference

use, cpu, page = Use.parse(sys.argv[1]), torch.device("cpu"), 16
paged, work = (parts.resolve("phase3_paged_attention", name, use) for name in ("kernels.paged", "work"))
specs = [AttentionSpec(4, 2, 16, 0.3, window, dtype=torch.float32) for window in (None, 20)]
backend = TritonAttention(specs[0], cpu, paged, work).steady(256)
torch.manual_seed(0)
kv = tuple(torch.randn(60, page, 2, 16) for _ in "kv")

def batch_of(lengths, new=1):
    blocks = list(range(60))
    random.Random(sum(lengths)).shuffle(blocks)
    scheduled, tables = [], []
    for i, length in enumerate(lengths):
        request = Request(str(i), list(range(length)), SamplingParams(), 0, (), 1)
        scheduled.append(ScheduledRequest(request, length - new, new))
        tables.append(tuple(blocks.pop() for _ in range(-(-length // page))))
    return Batch.build(Step(tuple(scheduled)), tables, page, cpu)

def error(plan, batch):
    q, worst = torch.randn(batch.num_tokens, 4, 16), 0.0
    tables = paged.Tables(batch.query_start.int(), batch.seq_lens.int(), batch.block_tables.int())
    for spec in specs:
        out = backend.run(spec, q, q, q, kv, plan)
        exact = reference.attend(q.double(), tuple(x.double() for x in kv), tables, None, scale=0.3, window=spec.window)
        worst = max(worst, float((out - exact).abs().max()))
    return worst

windows = frozenset((None, 20))
steps = [batch_of(lengths) for lengths in ((1, 1, 1), (200, 3, 17), (64, 300, 31), (16, 16, 250))]
plans = [backend.plan(batch, windows, page) for batch in steps]
sizes = {tuple(tensor.shape for tensor in plan.tensors) for plan in plans}
found = {"shapes": len({plan.shape for plan in plans}), "sizes": len(sizes)}
found["replayed"] = max(error(plans[0].with_tensors(p.tensors), batch) for p, batch in zip(plans, steps))
found["left"] = max(int(w.counters.abs().max()) for plan in plans for works in plan.work.values() for w in works)
chunk = batch_of((40, 25), new=9)
plan = backend.plan(chunk, windows, page)
found["chunk"], found["chunk is captured"] = error(plan, chunk), plan.shape is not None
print(json.dumps(found))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed (it is Linux only)")
def test_one_capture_serves_all_steps_of_as_many_decodes(use):
    found = interpreted(SCRIPT, str(use))
    assert found["shapes"] == found["sizes"] == 1
    assert found["replayed"] < 1e-5 and found["chunk"] < 1e-5
    assert found["left"] == 0 and not found["chunk is captured"]
