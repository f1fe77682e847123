"""Every variant of the Triton kernels that a launch could ask for, and the bytes they move; no part of the package."""
