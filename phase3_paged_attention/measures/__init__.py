"""How phase 3 is measured, graded and compared: benchmark cases, peers, checks on a GPU, measures of gates."""
