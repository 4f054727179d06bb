"""What is a program worth on a machine? Targets, work, time, energy, and the joint choice."""

from ridgeline.cost_model.all_reduce import InvalidSite, SiteChoice, Way, choose_site
from ridgeline.cost_model.choose import Choice, InfeasibleChoice, InvalidOption, Option, Step, solve
from ridgeline.cost_model.count import Uncountable, work_of, work_of_graph
from ridgeline.cost_model.doubt import doubt
from ridgeline.cost_model.estimate import Cost, estimate, launch_queue
from ridgeline.cost_model.lifetimes import Lifetimes
from ridgeline.cost_model.predict import predict
from ridgeline.cost_model.shapes import InvalidShape
from ridgeline.cost_model.target import (
    InvalidTarget,
    Target,
    UnknownTarget,
    load_target,
    target_names,
)
from ridgeline.cost_model.tensor_parallel import (
    InvalidStack,
    Schedule,
    ScheduleChoice,
    Stack,
    choose_schedule,
    stack_of,
)
from ridgeline.cost_model.values import Replaced
from ridgeline.cost_model.work import (
    Attention,
    BinaryAttention,
    Collective,
    Gemm,
    Norm,
    Stream,
    Work,
)

__all__ = [
    "Attention",
    "BinaryAttention",
    "Choice",
    "Collective",
    "Cost",
    "Gemm",
    "InfeasibleChoice",
    "InvalidOption",
    "InvalidShape",
    "InvalidSite",
    "InvalidStack",
    "InvalidTarget",
    "Lifetimes",
    "Norm",
    "Option",
    "Replaced",
    "Schedule",
    "ScheduleChoice",
    "SiteChoice",
    "Stack",
    "Step",
    "Stream",
    "Target",
    "Uncountable",
    "UnknownTarget",
    "Way",
    "Work",
    "choose_schedule",
    "choose_site",
    "doubt",
    "estimate",
    "launch_queue",
    "load_target",
    "predict",
    "solve",
    "stack_of",
    "target_names",
    "work_of",
    "work_of_graph",
]
