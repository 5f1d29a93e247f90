"""MACs, parameters and the arena of torchvision's and our own networks, against PyTorch's counter and fvcore's."""

import onnx_ir as ir
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from relief_export.graph.arena import plan_arena
from relief_export.graph.cost import cost
from relief_export.recipe import ModelConfig
from relief_export.training.models import build_model
from relief_export.training.vision import import_torchvision

FVCORE_MACS = ("conv", "linear", "addmm", "matmul", "bmm")
ARENA_GAP = 1.10
NETWORKS = (
    "alexnet", "squeezenet1_0", "squeezenet1_1", "resnet18", "resnet34",
    "mnasnet0_5", "mobilenet_v3_small", "shufflenet_v2_x0_5", "regnet_x_400mf", "efficientnet_b0",
)  # fmt: skip
# torch.export warns about its own tree specs, and fvcore traces with the deprecated torch.jit.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


ZOO = {"lenet300-100": (1, 28, 28), "lenet5": (1, 28, 28), "resnet20": (3, 32, 32)}


@pytest.fixture(params=[*NETWORKS, *ZOO])
def case(request):
    """A network and one sample for it."""
    if request.param in ZOO:
        shape = ZOO[request.param]
        return build_model(ModelConfig(request.param), shape, 10, 0).eval(), torch.zeros(1, *shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return import_torchvision().models.get_model(request.param, weights=None).eval(), torch.zeros(1, 3, 64, 64)


def exported(network, x):
    program = torch.onnx.export(network, (x,), dynamo=True, optimize=False, verbose=False)
    return ir.from_proto(ir.to_proto(program.model))


def test_figures_agree_with_the_other_counters_and_the_arena_with_its_bound(case):
    network, x = case
    graph = exported(network, x)
    bill = cost(graph)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x)
    assert 2 * bill.macs.structural == counter.get_total_flops()
    from fvcore.nn import FlopCountAnalysis  # noqa: PLC0415 - it warns on import, and only a test may ignore that

    fvcore = (
        FlopCountAnalysis(network, x).unsupported_ops_warnings(enabled=False).uncalled_modules_warnings(enabled=False)
    )
    operators = fvcore.by_operator()
    assert bill.macs.structural == sum(operators[name] for name in FVCORE_MACS)
    buffers = sum(b.numel() for b in network.buffers() if b.is_floating_point())
    assert bill.parameters.structural == sum(p.numel() for p in network.parameters()) + buffers
    assert bill.unknown == ()
    arena = plan_arena(graph)
    assert arena.lower_bound <= arena.bytes <= ARENA_GAP * arena.lower_bound
