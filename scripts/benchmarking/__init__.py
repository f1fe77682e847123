"""Parts of benchmark_model.py and benchmark_ops.py."""
