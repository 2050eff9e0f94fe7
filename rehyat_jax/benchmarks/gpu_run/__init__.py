"""All GPU figures of the project in one command that fits a short lease: `python -m rehyat_jax.benchmarks.gpu_run`."""
