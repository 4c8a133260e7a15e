from .bundled import bundled_behaviours as bundled_behaviours
from .demonstration import Demonstration as Demonstration
from .demonstration import Turn as Turn
from .demonstration import demonstrations_hash as demonstrations_hash
from .prompts import Prompt as Prompt
from .prompts import load_prompts as load_prompts
from .sources import NAMED_SOURCES as NAMED_SOURCES
from .sources import load_demonstrations as load_demonstrations
from .splits import Holdout as Holdout
from .splits import split_demonstrations as split_demonstrations

__all__ = [
    "NAMED_SOURCES",
    "Demonstration",
    "Holdout",
    "Prompt",
    "Turn",
    "bundled_behaviours",
    "demonstrations_hash",
    "load_demonstrations",
    "load_prompts",
    "split_demonstrations",
]
