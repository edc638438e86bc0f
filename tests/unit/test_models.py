"""The GPT: its size, its loss, its documents, its files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.functional import cross_entropy

from llmtrain.config.schema import GPTModel, SampleSection
from llmtrain.data import IGNORE, Batch, Documents, make_batch
from llmtrain.errors import CheckpointError
from llmtrain.evaluate import continue_text, sample_token
from llmtrain.models import loss as loss_module
from llmtrain.models import read_model
from llmtrain.models.attention import _flash
from llmtrain.models.gpt import GPT
from llmtrain.models.loss import Head, linear_cross_entropy
from llmtrain.shards import Rows
from llmtrain.strategies.forward import allow_graphs, evaluation_loss
from tests.support.kept import kept

SMALL = GPTModel(num_layers=2, num_heads=2, width=32, context=24, init="pytorch")


@pytest.mark.parametrize(("tied", "millions"), [(True, 124.4), (False, 163.0)])
def test_gpt2_small_has_the_known_number_of_parameters(tied: bool, millions: float):
    with torch.device("meta"):
        model = GPT(GPTModel(num_layers=12, num_heads=12, width=768, context=1024, tie_weights=tied), 50257)
    assert round(model.num_parameters() / 1e6, 1) == millions


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(99)
    before = torch.get_rng_state()
    first, again, other = GPT(SMALL, 100, seed=1), GPT(SMALL, 100, seed=1), GPT(SMALL, 100, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_gpt2_initialisation_scales_residual_projections():
    model = GPT(GPTModel(num_layers=8, num_heads=2, width=128, context=16, init="gpt2"), 1000)
    block = model.transformer["h"][0]
    assert block.attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert block.attn.c_attn.bias.abs().max() == 0


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("positions", [7, 512, 1100])
def test_chunked_loss_equals_the_textbook(positions: int, autocast: bool):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, 16, generator=generator, requires_grad=True)
    weight = torch.randn(97, 16, generator=generator, requires_grad=True)
    targets = torch.randint(0, 97, (positions,), generator=generator)
    targets[::3] = IGNORE
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = linear_cross_entropy(hidden, Head(weight), targets, IGNORE)
    (loss * 0.25).backward()
    ours = [loss.detach(), hidden.grad, weight.grad]
    hidden.grad = weight.grad = None
    reference = cross_entropy(hidden @ weight.t(), targets, ignore_index=IGNORE, reduction="sum")
    (reference * 0.25).backward()
    tolerance = 3e-2 if autocast else 1e-5
    for mine, theirs in zip(ours, [reference.detach(), hidden.grad, weight.grad], strict=True):
        assert (mine - theirs).norm() <= tolerance * theirs.norm()


def test_the_loss_without_gradients_is_exact():
    hidden, weight = torch.randn(600, 8), torch.randn(50, 8)
    targets = torch.randint(0, 50, (600,))
    with torch.no_grad():
        ours = linear_cross_entropy(hidden, Head(weight), targets, IGNORE)
    exact = cross_entropy((hidden.double() @ weight.double().t()), targets, reduction="sum")
    assert ours.dtype == torch.float64
    assert ours.item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize("trained", [True, False])
def test_the_loss_makes_a_gradient_of_the_output_layer_only_where_that_is_trained(trained: bool):
    """Of a frozen base with 128,000 tokens it would be a gigabyte, for nothing."""
    hidden, weight = torch.randn(30, 8, requires_grad=True), torch.randn(50, 8, requires_grad=trained)
    node = linear_cross_entropy(hidden, Head(weight), torch.randint(0, 50, (30,)), IGNORE).grad_fn
    assert node is not None
    kept = node.saved_tensors[1]
    assert kept.shape == weight.shape if trained else kept is None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_transformers_gives_the_same_logits(tmp_path: Path, tied: bool, qkv_bias: bool):
    from transformers import AutoModelForCausalLM

    config = SMALL.model_copy(update={"tie_weights": tied, "qkv_bias": qkv_bias})
    model = GPT(config, 100, seed=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # biases and norms away from 0 and 1
    model.save(tmp_path, dict(model.named_parameters()), eos_id=7)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 100, (2, 20))
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, model.logits(ids), atol=2e-5)
    assert theirs.config.eos_token_id == 7

    again, eos_id = read_model(tmp_path)
    with torch.no_grad():
        assert torch.equal(again.eval().logits(ids), model.logits(ids)) or not qkv_bias
        assert torch.allclose(again.logits(ids), model.logits(ids), atol=1e-6)
    assert eos_id == 7


def test_weights_of_another_model_are_refused(tmp_path: Path):
    GPT(SMALL, 100).save(tmp_path, dict(GPT(SMALL, 100).named_parameters()), eos_id=0)
    with pytest.raises(CheckpointError, match="not the weights of this model"):
        GPT(SMALL.model_copy(update={"width": 64}), 100).load(tmp_path)
    with pytest.raises(CheckpointError, match="tensors that this model does not have"):
        GPT(SMALL.model_copy(update={"num_layers": 1}), 100).load(tmp_path)


def test_weights_that_cannot_be_read_are_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read: .*No such file"):
        GPT(SMALL, 100).load(tmp_path)
    GPT(SMALL, 100).save(tmp_path, dict(GPT(SMALL, 100).named_parameters()), eos_id=0)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        GPT(SMALL, 100).load(tmp_path)


def test_packed_documents_are_computed_as_if_alone():
    model = GPT(SMALL, 100, seed=1).eval()
    tokens = np.random.default_rng(0).integers(0, 100, (1, 25)).astype(np.uint16)
    lens = np.array([5, 12, 6], np.int32)
    packed = make_batch(Rows(tokens, [lens], None), isolate_documents=True)
    with torch.no_grad():
        together = model.logits(packed.input_ids, packed.documents, packed.positions)
        leaky = model.logits(packed.input_ids)
        start = 0
        for length in lens[:-1]:
            alone = model.logits(packed.input_ids[:, start : start + length])
            assert torch.allclose(together[:, start : start + length], alone, atol=1e-5)
            if start:  # the test can tell: without the mask the documents do see each other
                assert (leaky[:, start : start + length] - alone).abs().max() > 0.01
            start += length


def test_packed_loss_is_the_sum_of_the_documents_losses():
    model = GPT(SMALL, 100, seed=1).eval()
    tokens = np.random.default_rng(1).integers(0, 100, (1, 25)).astype(np.uint16)
    lens = np.array([5, 12, 6], np.int32)

    def loss(batch):
        with torch.no_grad():
            return model(batch.input_ids, batch.targets, batch.documents, batch.positions).item()

    alone, start = 0.0, 0
    for length in lens:
        piece = tokens[:, start : start + length]
        alone += loss(make_batch(Rows(piece, [np.array([length], np.int32)], None), True))
        start += length
    assert loss(make_batch(Rows(tokens, [lens], None), True)) == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("listed", [True, False])
def test_the_output_layer_sees_what_is_learned(listed: bool, monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []

    def note(hidden: torch.Tensor, *others: Any) -> torch.Tensor:
        seen.append(len(hidden))
        return linear_cross_entropy(hidden, *others)

    tokens = np.arange(2 * 25, dtype=np.uint16).reshape(2, 25)
    mask = np.zeros_like(tokens, np.uint8)
    mask[:, 9:14] = 1
    batch = make_batch(Rows(tokens, [np.array([11, 9], np.int32)] * 2, mask), isolate_documents=True)
    model = GPT(SMALL, 100)
    expected = model(batch.input_ids, batch.targets, batch.documents, batch.positions)
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    monkeypatch.setattr("llmtrain.models.loss.linear_cross_entropy", note)
    loss = model(batch.input_ids, batch.targets, batch.documents, batch.positions, batch.learned if listed else None)
    loss.backward()
    assert seen == [batch.num_targets if listed else batch.targets.numel()]
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])


def test_generation_with_the_cache_equals_generation_without():
    model = GPT(SMALL, 100, seed=1).eval()
    prompt, greedy = [1, 2, 3], SampleSection(temperature=0.0, tokens=18)
    cached = list(continue_text(model.text_generator(), prompt, greedy, seed=0, eos_id=None))
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(18):
            ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
    assert cached == ids[3:]


def test_generation_goes_on_past_the_context():
    model = GPT(SMALL, 100, seed=1).eval()
    ids = list(continue_text(model.text_generator(), list(range(60)), SampleSection(tokens=60), seed=0, eos_id=None))
    assert len(ids) == 60
    again = list(continue_text(model.text_generator(), list(range(60)), SampleSection(tokens=60), seed=0, eos_id=None))
    assert ids == again


def test_top_k_and_top_p_cut_the_tail():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    generator = torch.Generator().manual_seed(0)

    def drawn(**settings) -> set[int]:
        config = SampleSection(temperature=1.0, **settings)
        return {sample_token(logits, config, generator) for _ in range(300)}

    assert drawn(top_k=None) == {0, 1, 2, 3}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_k=None, top_p=0.7) == {0, 1}
    assert drawn(top_k=None, top_p=0.81) == {0, 1, 2}
    assert sample_token(logits, SampleSection(temperature=0), generator) == 0


def test_a_low_temperature_sharpens_and_a_high_one_levels():
    logits, generator = torch.tensor([0.0, 1.0]), torch.Generator().manual_seed(0)

    def share(temperature: float) -> float:
        """How often the likelier one is drawn."""
        config = SampleSection(temperature=temperature)
        return sum(sample_token(logits, config, generator) for _ in range(400)) / 400

    assert [share(0.05), share(1.0), share(20.0)] == pytest.approx([1.0, 0.73, 0.51], abs=0.08)


@pytest.mark.parametrize("bf16", [False, True])
def test_activation_checkpointing_changes_memory_not_numbers(bf16: bool):
    """Dropout on: the second forward pass has to draw the same random numbers."""
    config = SMALL.model_copy(update={"dropout": 0.2})
    ids = torch.randint(0, 100, (2, 24), generator=torch.Generator().manual_seed(0))
    found: list[list[torch.Tensor]] = []
    sizes: list[int] = []
    for recompute in (False, True):
        model = GPT(config, 100, seed=3, activation_checkpointing=recompute)
        torch.manual_seed(7)
        with kept(model, bf16) as seen:
            loss = model(ids, ids)
        sizes.append(seen.bytes)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert sizes[1] < sizes[0] / 2


@pytest.mark.parametrize("documents", [False, True])
def test_the_compiled_model_is_one_graph_with_the_same_gradients(documents: bool):
    """Whatever would make the compiler leave the graph is an error here. No kernels are built: that takes a minute."""
    model = GPT(SMALL, 100, seed=3)
    ids = torch.randint(0, 100, (2, 24), generator=torch.Generator().manual_seed(0))
    starts = torch.tensor([0, 9, 24, 33, 48, 48, 48, 48], dtype=torch.int32)
    given = Documents(starts, 24) if documents else None
    positions = torch.cat([torch.arange(9), torch.arange(15)]).expand(2, -1) if documents else None
    found: list[list[torch.Tensor]] = []
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        loss = forward(ids, ids, given, positions)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for mine, reference in zip(*found, strict=True):
        torch.testing.assert_close(mine, reference)


def test_evaluation_is_not_compiled_where_the_module_is_compiled_in_place():
    """As DeepSpeed does: a second graph, for want of gradients, took long enough to pass for a hang."""
    compiled: list[Any] = []

    def note(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model = GPT(SMALL, 100, seed=3)
    ids = torch.zeros(2, 24, dtype=torch.int64)
    expected = evaluation_loss(model, Batch(ids, ids, None, None, 48), torch.device("cpu"), bf16=False)
    model.compile(backend=note)
    loss = evaluation_loss(model, Batch(ids, ids, None, None, 48), torch.device("cpu"), bf16=False)
    assert (loss.item(), compiled) == (expected.item(), [])
    model(ids, ids)
    assert compiled


@pytest.mark.parametrize("recompute", [False, True])
def test_with_a_gpus_kernel_for_documents_the_model_is_one_graph(recompute: bool, monkeypatch: pytest.MonkeyPatch):
    """As a GPU would have it, up to the graph: there is no kernel here to run."""

    def as_on_a_gpu(q: Tensor, k: Tensor, v: Tensor, apart: Documents, causal: bool, dropout: float) -> Tensor:
        return _flash(q, k, v, apart, None)

    class Captured(Exception):
        pass

    def keep(graph: Any, inputs: Any) -> Any:
        raise Captured(str(graph.graph))

    monkeypatch.setattr("llmtrain.models.gpt.kept_apart", lambda documents, x, flash: documents)
    monkeypatch.setattr("llmtrain.models.gpt.attention", as_on_a_gpu)
    model = GPT(SMALL, 100, seed=3, activation_checkpointing=recompute)
    ids, starts = torch.zeros(2, 24, dtype=torch.int64), torch.tensor([0, 9, 24, 48], dtype=torch.int32)
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(model, backend=keep, fullgraph=True)(ids, ids, Documents(starts, 24))
    assert isinstance(caught.value.inner_exception, Captured)


def test_the_compiled_model_is_one_graph_with_dropout_in_bf16():
    model = GPT(SMALL.model_copy(update={"dropout": 0.2, "init": "gpt2"}), 100, seed=3)
    ids = torch.randint(0, 100, (2, 24), generator=torch.Generator().manual_seed(0))
    forward = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = forward(ids, ids.roll(1))
    loss.backward()
    assert loss.item() / ids.numel() == pytest.approx(4.6, abs=0.3)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.soak
def test_batches_of_many_lengths_stay_compiled(monkeypatch: pytest.MonkeyPatch):
    """One graph for each number of pieces that the loss is made in; torch would stop after 8, in silence."""
    import torch._dynamo.config

    monkeypatch.setattr(loss_module, "loss_chunk", lambda device, vocab_size: 4)
    model = GPT(SMALL.model_copy(update={"num_layers": 1}), 100, seed=3)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        allow_graphs()
        forward: Any = torch.compile(model, backend="eager")
        for length in range(2, 22, 2):
            ids = torch.randint(0, 100, (2, length), generator=torch.Generator().manual_seed(length))
            torch.testing.assert_close(forward(ids, ids), model(ids, ids))


@pytest.mark.parametrize("tied", [True, False])
def test_the_operations_of_a_token_are_counted_as_palm_does(tied: bool):
    """6 for each weight that it is multiplied with, and 12 for each layer, channel and position."""
    model = GPT(SMALL.model_copy(update={"tie_weights": tied}), 50)
    layers = sum(p.numel() for name, p in model.named_parameters() if ".h." in name or ".ln_f." in name)
    assert model.flops_per_token() == 6 * (layers + 50 * 32) + 12 * 2 * 32 * 24
