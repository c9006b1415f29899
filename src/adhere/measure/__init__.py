"""What is known afterwards: metrics, their intervals, one or two models on one prompt set, audits, comparisons."""
