"""Diagnostics of one's own model: how normalization acts on its loss, gradients, statistics, in any framework."""

from .chain import Activation, Conv, Dense, Flatten, cross_entropy, mean_squared_error
from .covariate_shift import Shift, covariate_shift
from .gradient_flow import Flow, gradient_flow
from .landscape import Landscape, landscape
from .objective import ModelObjective, Objective, layers_of, objective
from .trace import Trace

__all__ = [
    "Activation",
    "Conv",
    "Dense",
    "Flatten",
    "Flow",
    "Landscape",
    "ModelObjective",
    "Objective",
    "Shift",
    "Trace",
    "covariate_shift",
    "cross_entropy",
    "gradient_flow",
    "landscape",
    "layers_of",
    "mean_squared_error",
    "objective",
]
