"""What is computed again in the backward pass is what torch would have kept: the same bits."""

import pytest
import torch
from torch import Tensor, nn

from llmtrain.models import projections
from llmtrain.models.projections import norm_linear, norm_mlp

WIDTH = 48


def layers(bias: bool) -> tuple[nn.LayerNorm, nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    norm = nn.LayerNorm(WIDTH, eps=1e-3)  # no usual one: it has to be heard in both passes
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm, nn.Linear(WIDTH, 4 * WIDTH, bias=bias), nn.Linear(4 * WIDTH, WIDTH)


def results(what: str, bias: bool = True, train: bool = True) -> list[Tensor]:
    """Output, and gradients of input and parameters, under autocast."""
    norm, up, down = layers(bias)
    x_BTD = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1), requires_grad=train)
    with torch.autocast("cpu", torch.bfloat16):
        out_BTE = norm_linear(x_BTD, norm, up) if what == "linear" else norm_mlp(x_BTD, norm, up, down)
    if not train:
        return [out_BTE.detach()]
    out_BTE.float().square().sum().backward()
    assert x_BTD.grad is not None
    used = [norm, up] if what == "linear" else [norm, up, down]
    return [out_BTE.detach(), x_BTD.grad, *(p.grad for each in used for p in each.parameters() if p.grad is not None)]


@pytest.mark.parametrize(("what", "bias"), [("linear", True), ("linear", False), ("mlp", True)])
def test_the_same_numbers_as_torchs_layers(what: str, bias: bool, monkeypatch: pytest.MonkeyPatch):
    mine = results(what, bias)
    assert torch.equal(mine[0], results(what, bias, train=False)[0])  # evaluation goes torch's way
    monkeypatch.setattr(projections, "_recomputes", lambda x: False)
    reference = results(what, bias)
    assert len(mine) == len(reference) == {("linear", True): 6, ("linear", False): 5, ("mlp", True): 8}[what, bias]
    assert all(torch.equal(a, b) for a, b in zip(mine, reference, strict=True))
