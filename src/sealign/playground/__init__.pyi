from .conversation import Conversation as Conversation
from .offered_edits import OfferedEdits as OfferedEdits
from .playground import Playground as Playground

__all__ = [
    "Conversation",
    "OfferedEdits",
    "Playground",
]
