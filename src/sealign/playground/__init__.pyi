from .conversation import Conversation as Conversation

__all__ = [
    "Conversation",
]
