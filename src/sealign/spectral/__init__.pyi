from .cross_covariance import CrossCovariance as CrossCovariance
from .cross_covariance_matrix import CrossCovarianceMatrix as CrossCovarianceMatrix
from .decomposition import Spectrum as Spectrum
from .decomposition import leading_spectrum as leading_spectrum
from .feature_maps import FEATURE_MAPS as FEATURE_MAPS
from .feature_maps import FeatureMap as FeatureMap
from .feature_maps import get_feature_map as get_feature_map
from .projection import Projection as Projection
from .reading_direction import reading_direction as reading_direction
from .signature import layer_signature as layer_signature

__all__ = [
    "FEATURE_MAPS",
    "CrossCovariance",
    "CrossCovarianceMatrix",
    "FeatureMap",
    "Projection",
    "Spectrum",
    "get_feature_map",
    "layer_signature",
    "leading_spectrum",
    "reading_direction",
]
