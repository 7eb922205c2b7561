"""Optimisers that need forward passes only: they probe weights with noise, and step along the noise."""

from ulr_kernels.optim.es import EGGROLL, ES
from ulr_kernels.optim.fzoo import FZOO
from ulr_kernels.optim.mezo import MeZO
from ulr_kernels.optim.serving import ServedWeights, Shard, WorkerExtension
from ulr_kernels.optim.update import Group, Rule, Update
from ulr_kernels.optim.workers import WorkerError, Workers

__all__ = [
    "EGGROLL",
    "ES",
    "FZOO",
    "Group",
    "MeZO",
    "Rule",
    "ServedWeights",
    "Shard",
    "Update",
    "WorkerError",
    "WorkerExtension",
    "Workers",
]
