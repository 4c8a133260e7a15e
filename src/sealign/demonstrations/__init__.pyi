from .demonstration import Demonstration as Demonstration
from .demonstration import demonstrations_hash as demonstrations_hash
from .sources import NAMED_SOURCES as NAMED_SOURCES
from .sources import load_demonstrations as load_demonstrations

__all__ = [
    "NAMED_SOURCES",
    "Demonstration",
    "demonstrations_hash",
    "load_demonstrations",
]
