"""Policies: how a budget of cached numbers is shared out. A policy sees energies and costs, never a method."""

from kvcompress.policies.base import Policy, SiteCurve
from kvcompress.policies.energy import Energy
from kvcompress.policies.loss import Loss
from kvcompress.policies.uniform import Middle, Uniform

POLICIES: dict[str, type[Policy]] = {"uniform": Uniform, "middle": Middle, "energy": Energy, "loss": Loss}

__all__ = ["POLICIES", "Energy", "Loss", "Middle", "Policy", "SiteCurve", "Uniform"]
