"""What talks HTTP and says no: where the learner begins."""
