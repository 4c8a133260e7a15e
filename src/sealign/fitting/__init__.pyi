from .activation_store import Keep as Keep
from .activation_store import choose_keep as choose_keep
from .activations import Activations as Activations
from .collect_config import CollectConfig as CollectConfig
from .collecting import collect_activations as collect_activations
from .edit_config import EditConfig as EditConfig
from .layer_statistics import LayerStatistics as LayerStatistics
from .plan import FitPlan as FitPlan
from .plan import measure_tflops as measure_tflops
from .plan import plan_fit as plan_fit
from .workers import worker_group as worker_group

__all__ = [
    "Activations",
    "CollectConfig",
    "EditConfig",
    "FitPlan",
    "Keep",
    "LayerStatistics",
    "choose_keep",
    "collect_activations",
    "measure_tflops",
    "plan_fit",
    "worker_group",
]
