"""Where phase 3 starts: right answers, a program a query head, keys read twice, everything gathered on a CPU."""
