"""What the learner makes fast on a GPU."""
