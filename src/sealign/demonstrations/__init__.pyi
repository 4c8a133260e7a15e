from .demonstration import Demonstration as Demonstration
from .demonstration import Turn as Turn
from .demonstration import demonstrations_hash as demonstrations_hash
from .sources import NAMED_SOURCES as NAMED_SOURCES
from .sources import load_demonstrations as load_demonstrations
from .splits import Holdout as Holdout
from .splits import split_demonstrations as split_demonstrations

__all__ = [
    "NAMED_SOURCES",
    "Demonstration",
    "Holdout",
    "Turn",
    "demonstrations_hash",
    "load_demonstrations",
    "split_demonstrations",
]
