"""What a forward pass under ZeRO-2 computes in, where DeepSpeed takes autocast for one of a GPU. Prints the dtypes.

python -m tests.support.autocast_probe
"""

import torch
from torch import Tensor, nn

from llmtrain.config.schema import GPTModel, RunConfig, StrategySection
from llmtrain.data import Batch
from llmtrain.models import GPT
from llmtrain.strategies import build_strategy
from llmtrain.world import find_world

MODEL = GPTModel(num_layers=1, num_heads=2, width=16, context=32)


def main() -> None:
    world = find_world("cpu", "default")
    world.start_groups(60, even_alone=True)
    for bf16 in (True, False):
        model = GPT(MODEL, 64)
        seen: list[torch.dtype] = []

        def note(_module: nn.Module, _inputs: object, output: Tensor, seen: list[torch.dtype] = seen) -> None:
            seen.append(output.dtype)

        model.get_submodule("transformer.h.0.attn.c_proj").register_forward_hook(note)
        config = RunConfig(model=MODEL, strategy=StrategySection(kind="zero2"))
        strategy = build_strategy(config, model, world, bf16=bf16)
        # DeepSpeed asks about a GPU's autocast alone; here this is what it would hear there.
        torch.set_autocast_enabled("cuda", bf16)
        ids = torch.randint(0, 64, (1, MODEL.context))
        strategy.accumulate(Batch(ids, ids, None, None, ids.numel()), 1.0, last=True)
        strategy.update(1e-4)
        print(bf16, *seen)


if __name__ == "__main__":
    main()
