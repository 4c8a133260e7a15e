from .demonstrations.demonstration import Demonstration as Demonstration
from .demonstrations.sources import load_demonstrations as load_demonstrations
from .demonstrations.splits import Holdout as Holdout
from .demonstrations.splits import split_demonstrations as split_demonstrations
from .edits.affine_edit import AffineEdit as AffineEdit
from .edits.attach import apply_edit as apply_edit
from .edits.attach import attach as attach
from .edits.edit import Edit as Edit
from .edits.handle import EditHandle as EditHandle
from .edits.intervention import Intervention as Intervention
from .errors import SealignError as SealignError
from .fitting.activations import Activations as Activations
from .fitting.collect_config import CollectConfig as CollectConfig
from .fitting.collecting import collect_activations as collect_activations
from .methods.best_of_n import BestOfNConfig as BestOfNConfig
from .methods.composition import Composition as Composition
from .methods.contrastive_decoding import CDConfig as CDConfig
from .methods.contrastive_decoding import ICDConfig as ICDConfig
from .methods.difference_operator import DifferenceOperatorConfig as DifferenceOperatorConfig
from .methods.dola import DoLaConfig as DoLaConfig
from .methods.icl import ICLConfig as ICLConfig
from .methods.iti import ITIConfig as ITIConfig
from .methods.leace import LEACEConfig as LEACEConfig
from .methods.lora_ft import LoRAFTConfig as LoRAFTConfig
from .methods.mean_difference import MeanDifferenceConfig as MeanDifferenceConfig
from .methods.registry import fit_edit as fit_edit
from .methods.registry import fit_edit_from_activations as fit_edit_from_activations
from .methods.registry import load_edit as load_edit
from .methods.sea import SEAConfig as SEAConfig
from .methods.sea import fit_projection as fit_projection
from .methods.targeted_shift import TargetedShiftConfig as TargetedShiftConfig
from .models.loading import load_model as load_model
from .models.prompt_format import PromptFormat as PromptFormat
from .models.sites import resolve_sites as resolve_sites
from .spectral.projection import Projection as Projection

__version__: str
__all__ = [
    "Activations",
    "AffineEdit",
    "BestOfNConfig",
    "CDConfig",
    "CollectConfig",
    "Composition",
    "Demonstration",
    "DifferenceOperatorConfig",
    "DoLaConfig",
    "Edit",
    "EditHandle",
    "Holdout",
    "ICDConfig",
    "ICLConfig",
    "ITIConfig",
    "Intervention",
    "LEACEConfig",
    "LoRAFTConfig",
    "MeanDifferenceConfig",
    "Projection",
    "PromptFormat",
    "SEAConfig",
    "SealignError",
    "TargetedShiftConfig",
    "__version__",
    "apply_edit",
    "attach",
    "collect_activations",
    "fit_edit",
    "fit_edit_from_activations",
    "fit_projection",
    "load_demonstrations",
    "load_edit",
    "load_model",
    "resolve_sites",
    "split_demonstrations",
]
