"""Optimisers that need forward passes only: they probe weights with noise, and step along the noise."""

from ulr_kernels.optim.update import Group, Rule, Update

__all__ = ["Group", "Rule", "Update"]
