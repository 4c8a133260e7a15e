from .control_vector import export_control_vector as export_control_vector
from .control_vector import read_control_vector as read_control_vector
from .deviation import Deviation as Deviation
from .deviation import measure_deviation as measure_deviation
from .gguf import export_gguf as export_gguf
from .gguf import export_gguf_lora as export_gguf_lora
from .llama_cpp import llama_outputs as llama_outputs
from .lora import export_lora as export_lora
from .lora import lora_factors as lora_factors
from .merged import export_merged as export_merged
from .verify import Agreement as Agreement
from .verify import Outputs as Outputs
from .verify import compare_outputs as compare_outputs
from .verify import model_outputs as model_outputs
from .verify import reference_outputs as reference_outputs

__all__ = [
    "Agreement",
    "Deviation",
    "Outputs",
    "compare_outputs",
    "export_control_vector",
    "export_gguf",
    "export_gguf_lora",
    "export_lora",
    "export_merged",
    "llama_outputs",
    "lora_factors",
    "measure_deviation",
    "model_outputs",
    "read_control_vector",
    "reference_outputs",
]
