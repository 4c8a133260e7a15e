from .client import server_outputs as server_outputs
from .launch import server_command as server_command
from .launch import start_server as start_server
from .settings import ServerSettings as ServerSettings

__all__ = [
    "ServerSettings",
    "server_command",
    "server_outputs",
    "start_server",
]
