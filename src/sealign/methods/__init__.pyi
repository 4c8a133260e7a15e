from .best_of_n import BestOfNConfig as BestOfNConfig
from .composition import Composition as Composition
from .contrastive_decoding import CDConfig as CDConfig
from .contrastive_decoding import ICDConfig as ICDConfig
from .difference_operator import DifferenceOperatorConfig as DifferenceOperatorConfig
from .dola import DoLaConfig as DoLaConfig
from .edit_sources import load_edit_source as load_edit_source
from .fit_cache import fit_or_load as fit_or_load
from .icl import ICLConfig as ICLConfig
from .icl import few_shot_text as few_shot_text
from .iti import ITIConfig as ITIConfig
from .leace import LEACEConfig as LEACEConfig
from .lora_ft import LoRAFTConfig as LoRAFTConfig
from .mean_difference import MeanDifferenceConfig as MeanDifferenceConfig
from .method import FitContext as FitContext
from .method import Method as Method
from .parse_settings import parse_settings as parse_settings
from .registry import METHODS as METHODS
from .registry import fit_edit as fit_edit
from .registry import fit_edit_from_activations as fit_edit_from_activations
from .registry import get_method as get_method
from .registry import load_edit as load_edit
from .registry import method_of as method_of
from .sea import SEAConfig as SEAConfig
from .sea import decompose as decompose
from .sea import fit_projection as fit_projection
from .sea import projection_edit as projection_edit
from .targeted_shift import TargetedShiftConfig as TargetedShiftConfig

__all__ = [
    "METHODS",
    "BestOfNConfig",
    "CDConfig",
    "Composition",
    "DifferenceOperatorConfig",
    "DoLaConfig",
    "FitContext",
    "ICDConfig",
    "ICLConfig",
    "ITIConfig",
    "LEACEConfig",
    "LoRAFTConfig",
    "MeanDifferenceConfig",
    "Method",
    "SEAConfig",
    "TargetedShiftConfig",
    "decompose",
    "few_shot_text",
    "fit_edit",
    "fit_edit_from_activations",
    "fit_or_load",
    "fit_projection",
    "get_method",
    "load_edit",
    "load_edit_source",
    "method_of",
    "parse_settings",
    "projection_edit",
]
