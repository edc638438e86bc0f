"""How ranks share the work. `build_strategy` is the only place that knows the kinds."""

from torch import nn

from llmtrain.config.schema import RunConfig
from llmtrain.strategies.ddp import DDPStrategy
from llmtrain.strategies.interface import Strategy
from llmtrain.strategies.zero2 import ZeRO2Strategy, deepspeed_config
from llmtrain.world import World

__all__ = ["Strategy", "build_strategy", "deepspeed_config"]


def build_strategy(config: RunConfig, model: nn.Module, world: World, bf16: bool) -> Strategy:
    """Collective. Put `model` under the strategy that the configuration names."""
    match config.strategy.kind:
        case "ddp":
            return DDPStrategy(config, model, world, bf16)
        case "zero2":
            return ZeRO2Strategy(config, model, world, bf16)
