from .embedded_demo import BehaviourResult as BehaviourResult
from .embedded_demo import run_demo as run_demo
from .reproduce_config import ReproduceConfig as ReproduceConfig
from .targets import TARGETS as TARGETS
from .targets import reproduce as reproduce

__all__ = [
    "TARGETS",
    "BehaviourResult",
    "ReproduceConfig",
    "reproduce",
    "run_demo",
]
