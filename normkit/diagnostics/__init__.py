"""Diagnostics of one's own model: how normalization acts on its loss, gradients, statistics, in any framework."""

from normkit._population import Gaps, statistics_gap

from .activation_shift import ActivationShift, activation_shift
from .chain import Activation, Conv, Dense, Flatten, cross_entropy, mean_squared_error
from .channels import ChannelGap, precise_statistics
from .convergence import Conditioning, Convergence, conditioning, convergence
from .covariate_shift import Shift, covariate_shift
from .curvature import Curvature, curvature
from .gradient_flow import Flow, gradient_flow
from .landscape import Landscape, landscape
from .objective import ModelObjective, Objective, layers_of, objective
from .scale_response import ScaleResponse, scale_response
from .trace import Trace

__all__ = [
    "Activation",
    "ActivationShift",
    "ChannelGap",
    "Conditioning",
    "Conv",
    "Convergence",
    "Curvature",
    "Dense",
    "Flatten",
    "Flow",
    "Gaps",
    "Landscape",
    "ModelObjective",
    "Objective",
    "ScaleResponse",
    "Shift",
    "Trace",
    "activation_shift",
    "conditioning",
    "convergence",
    "covariate_shift",
    "cross_entropy",
    "curvature",
    "gradient_flow",
    "landscape",
    "layers_of",
    "mean_squared_error",
    "objective",
    "precise_statistics",
    "scale_response",
    "statistics_gap",
]
