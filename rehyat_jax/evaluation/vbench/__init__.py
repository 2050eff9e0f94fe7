"""Videos for VBench and VBench-2.0: which to make of which prompts, and under which names the benchmarks look for them.

The benchmarks and their prompts are not part of this package. Their repository is https://github.com/Vchitect/VBench.
"""
