"""What a run needs on a pod, told before one is rented."""

from jax_entropy.plan.compile import Plan, plan, search

__all__ = ["Plan", "plan", "search"]
