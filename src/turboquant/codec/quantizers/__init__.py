"""Vector quantizers of the research papers, for comparison and study.

The cache itself stores pages (:mod:`turboquant.codec.page`). These classes share one small interface,
:class:`VectorQuantizer`, and :data:`QUANTIZERS` lists them by name; each can be made from ``dim`` alone.
"""

from .base import Encoded, VectorQuantizer
from .mse import TurboQuantMSE
from .outlier import OutlierChannels
from .polar import PolarQuant
from .prod import TurboQuantProd
from .qjl import QJL

QUANTIZERS: dict[str, type[VectorQuantizer]] = {
    "turboquant_mse": TurboQuantMSE,
    "turboquant_prod": TurboQuantProd,
    "qjl": QJL,
    "polarquant": PolarQuant,
    "outlier_channels": OutlierChannels,
}

__all__ = [
    "QJL",
    "QUANTIZERS",
    "Encoded",
    "OutlierChannels",
    "PolarQuant",
    "TurboQuantMSE",
    "TurboQuantProd",
    "VectorQuantizer",
]
