from .fingerprint import check_fingerprint as check_fingerprint
from .fingerprint import model_fingerprint as model_fingerprint
from .fingerprint import template_hash as template_hash
from .fingerprint import tokenizer_hash as tokenizer_hash
from .generation import generate_ids as generate_ids
from .loading import checkpoint_folder as checkpoint_folder
from .loading import load_model as load_model
from .loading import load_skeleton as load_skeleton
from .output_matrices import OutputMatrix as OutputMatrix
from .output_matrices import output_matrices as output_matrices
from .output_matrices import read_weight as read_weight
from .prompt_format import PromptFormat as PromptFormat
from .prompt_format import default_preamble as default_preamble
from .prompt_format import read_preamble as read_preamble
from .recorder import Recorder as Recorder
from .sampling import Sampling as Sampling
from .shared_prefix import Prefix as Prefix
from .shared_prefix import common_prefix as common_prefix
from .sites import ResolvedSite as ResolvedSite
from .sites import resolve_sites as resolve_sites
from .sites import select_layers as select_layers
from .structure import decoder_layers as decoder_layers
from .structure import text_config as text_config
from .structure import unwrap_model as unwrap_model
from .weights import weights_digest as weights_digest
from .weights import weights_hash as weights_hash

__all__ = [
    "OutputMatrix",
    "Prefix",
    "PromptFormat",
    "Recorder",
    "ResolvedSite",
    "Sampling",
    "check_fingerprint",
    "checkpoint_folder",
    "common_prefix",
    "decoder_layers",
    "default_preamble",
    "generate_ids",
    "load_model",
    "load_skeleton",
    "model_fingerprint",
    "output_matrices",
    "read_preamble",
    "read_weight",
    "resolve_sites",
    "select_layers",
    "template_hash",
    "text_config",
    "tokenizer_hash",
    "unwrap_model",
    "weights_digest",
    "weights_hash",
]
