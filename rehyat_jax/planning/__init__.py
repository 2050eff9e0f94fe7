"""What a training run will need and take on a TPU that is not there yet; see docs/plan.md."""
