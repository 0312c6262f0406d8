"""Where phase 1 starts: right answers, wasted memory. `make start-phase1` copies these files into your workspace."""
