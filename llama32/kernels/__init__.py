"""Fast linear layers, and the autotuner to time and select kernels."""
