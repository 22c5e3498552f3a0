"""What a recipe will need: memory of a GPU, floating point operations, time. From model configurations alone."""

from .plan import Plan, plan


__all__ = ["Plan", "plan"]
