"""Training at scale, on paper: what a transformer's step takes on a cluster, and which of its divisions is the fastest.

`ringhold predict` and `ringhold plan --config` call it. Nothing here needs torch.
"""

from parallel.scale.cluster import Cluster
from parallel.scale.predict import Prediction, predict
from parallel.scale.search import Candidate, search
from parallel.scale.strategy import Strategy
from parallel.scale.transformer import Transformer

__all__ = ["Candidate", "Cluster", "Prediction", "Strategy", "Transformer", "predict", "search"]
