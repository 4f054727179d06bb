"""How does an op become code? Kernels per back end, and the lowering that puts them in place."""
