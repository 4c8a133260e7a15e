from .affine_edit import AffineEdit as AffineEdit
from .attach import apply_edit as apply_edit
from .attach import attach as attach
from .edit import Edit as Edit
from .feature_map_edit import FeatureMapEdit as FeatureMapEdit
from .gate import Gate as Gate
from .handle import EditHandle as EditHandle
from .intervention import Intervention as Intervention
from .layer_edit import LayerEdit as LayerEdit
from .operator import edit_tokens as edit_tokens
from .record import EditRecord as EditRecord
from .record import LayerRecord as LayerRecord
from .record import ModelRecord as ModelRecord
from .strength import check_strength as check_strength

__all__ = [
    "AffineEdit",
    "Edit",
    "EditHandle",
    "EditRecord",
    "FeatureMapEdit",
    "Gate",
    "Intervention",
    "LayerEdit",
    "LayerRecord",
    "ModelRecord",
    "apply_edit",
    "attach",
    "check_strength",
    "edit_tokens",
]
