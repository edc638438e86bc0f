"""What the loop calls to evaluate: the held-out split's scores, answers to held-out prompts, samples of text."""

from collections.abc import Callable

from tokenizers import Tokenizer

from llmtrain import log, prompts, task
from llmtrain.batches import BatchPlan
from llmtrain.config import RunConfig
from llmtrain.data import split_batches
from llmtrain.evaluate import continue_text, score
from llmtrain.manifest import TrainState
from llmtrain.metrics import Meter
from llmtrain.models import Trainable
from llmtrain.shards import ShardFolder
from llmtrain.strategies import Strategy
from llmtrain.strategies.forward import autocast
from llmtrain.world import World


def make_evaluate(
    config: RunConfig,
    data: ShardFolder,
    plan: BatchPlan,
    strategy: Strategy,
    world: World,
    answer_task: Callable[[TrainState], dict[str, float]] | None,
) -> Callable[[TrainState, bool], dict[str, float]]:
    """Collective when called: scores of the whole held-out split, of some training rows, and of the task."""
    heldout, training = data.split("heldout"), data.split("train")
    batch_size = config.evaluate.batch_size or plan.micro_batch_size
    isolate = config.data.isolates_documents

    def evaluate(state: TrainState, with_task: bool) -> dict[str, float]:
        batches = split_batches(heldout, batch_size, world.rank, world.size, isolate)
        result = score(strategy.loss, batches, world)
        scores = {
            "loss": result.loss,
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte(heldout.info),
        }
        if config.evaluate.train_rows:
            batches = split_batches(training, batch_size, world.rank, world.size, isolate, config.evaluate.train_rows)
            scores["train_loss"] = score(strategy.loss, batches, world).loss
        if with_task and answer_task is not None:
            scores |= answer_task(state)
        return scores

    return evaluate


def make_task(
    config: RunConfig, data: ShardFolder, model: Trainable, world: World, meter: Meter
) -> Callable[[TrainState], dict[str, float]] | None:
    """Collective when called: answer held-out prompts; the first answer is written down as a sample."""
    if not config.evaluate.task.samples:
        return None
    asked = task.questions(data.split("heldout"), config.evaluate.task.samples)
    tokenizer = Tokenizer.from_file(str(data.tokenizer / "tokenizer.json"))

    def answer_task(state: TrainState) -> dict[str, float]:
        scores, pairs = task.answer(
            model.text_generator, asked, tokenizer, data.manifest.tokenizer.eos_id, config.evaluate.task, world
        )
        if world.is_main and pairs:
            meter.sample(state, *pairs[0])
            figures = "  ".join(f"{name.removeprefix('task_')} {value:.3f}" for name, value in scores.items())
            log.info(f"task       {len(asked)} held-out prompts: {figures}")
        return scores

    return answer_task


def make_sampler(
    config: RunConfig, data: ShardFolder, model: Trainable, world: World, meter: Meter
) -> Callable[[TrainState], None]:
    """On rank 0: continue the configured prompt, asked as the samples ask, and write the text down."""
    bf16 = config.train.precision == "bf16"
    sampling, eos_id = config.evaluate.sample, data.manifest.tokenizer.eos_id
    tokenizer = Tokenizer.from_file(str(data.tokenizer / "tokenizer.json"))
    format = config.data.format
    prompt_ids = prompts.asked_ids(tokenizer, data.tokenizer, eos_id, format, sampling.prompt) or [eos_id]
    prompt = tokenizer.decode(prompt_ids) if format.kind in ("instruction", "chat") else sampling.prompt

    def write_sample(state: TrainState) -> None:
        with autocast(world.device, bf16):  # around all tokens: each weight is cast once, and read in half the bytes
            ids = list(continue_text(model.text_generator(), prompt_ids, sampling, config.run.seed, eos_id))
        text = tokenizer.decode(ids)
        meter.sample(state, prompt, text)
        log.info(f"sample     {log.printable(prompt + text)}")

    return write_sample
