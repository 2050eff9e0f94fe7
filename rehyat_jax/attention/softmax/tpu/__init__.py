"""Full softmax attention as fused TPU kernels, forward and backward."""
