"""The paper's instruments, its baselines on the same backbone, and the reproduction of its tables."""
