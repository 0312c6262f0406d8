"""`python -m phase4_scheduler "def quicksort("`: the engine as of this phase, with tokens/s."""

from __future__ import annotations

from phase0_prototype.entry import main

main("phase4")
