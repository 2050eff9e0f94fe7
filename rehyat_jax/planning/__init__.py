"""Estimates of the memory and the time of a training run, without the devices it runs on; see docs/plan.md."""
