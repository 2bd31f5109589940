"""Quality of a compressed cache on a real model: perplexity, KL divergence and top-1 agreement against the exact cache."""

from .baselines import BASELINES
from .perplexity import Row, evaluate, known_rows

__all__ = ["BASELINES", "Row", "evaluate", "known_rows"]
