"""Predicts what a recipe needs from model configurations: GPU memory, FLOPs and time. Needs no weights and no GPU."""

from .plan import Plan, plan


__all__ = ["Plan", "plan"]
