"""The back ends: each of `cpp`, `cuda` and `triton` has `provider(op, device)`, which `ulr_kernels.dispatch` calls."""
