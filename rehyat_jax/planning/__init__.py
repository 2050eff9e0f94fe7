"""Estimates of the memory and the time of training and of sampling, without the devices; see docs/plan.md."""
