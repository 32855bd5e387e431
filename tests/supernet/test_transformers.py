"""Stochastic layers inside a model of transformers, which knows nothing of them."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tossup import (
    GatedAdamW,
    Mamba,
    MixerTable,
    Router,
    StochasticMixer,
    Strategy,
    parameter_groups,
)
from tossup.supernet.mixers import Attention, GroupedMamba


def llama(layers: int, attention: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        use_cache=False,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config)


def supernet(layers: int = 2, per_sample: bool = False) -> tuple[LlamaForCausalLM, Router]:
    """Llama with {its own attention, Mamba} in every layer."""
    model = llama(layers)
    router = Router(Strategy(mixers=2, per_sample=per_sample), layers=layers, seed=1)
    for i, block in enumerate(model.model.layers):
        mixers = {"attention": block.self_attn, "mamba": Mamba(32)}
        block.self_attn = StochasticMixer(mixers, layer=i, router=router, num_outputs=2)
    return model, router


@pytest.mark.parametrize("per_sample", [False, True])
def test_evaluation_is_llama_and_training_follows_the_table(per_sample):
    tokens = torch.randint(50, (4, 9))
    expected = llama(3).eval()(tokens).logits
    model, router = supernet(3, per_sample)
    assert torch.equal(model.eval()(tokens).logits, expected)

    model.train()
    for _ in range(3):
        table = router.draw(batch=4).table.expand(-1, 4)
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        for i, block in enumerate(model.model.layers):
            for index, mixer in enumerate(block.self_attn.mixers.values()):
                used = any(p.grad is not None and p.grad.any() for p in mixer.parameters())
                assert used == bool((table[i] == index).any())


def with_mixers(attention: str) -> LlamaForCausalLM:
    """Llama with mixers of Tossup's in all layers but one."""
    model = llama(4, attention)
    mixers = (Mamba(32), Attention(32, heads=4), GroupedMamba(32, 32, 16, 4))
    for block, mixer in zip(model.model.layers, mixers, strict=False):
        block.self_attn = StochasticMixer({"ours": mixer}, num_outputs=2)
    return model.eval()


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_give_what_their_sequences_give_alone(attention, side):
    model, lengths = with_mixers(attention), (7, 4, 1)
    tokens, mask = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(7 - length, 7) if side == "left" else slice(length)
        tokens[row, place] = torch.randint(50, (length,))
        mask[row, place] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(tokens, attention_mask=mask, position_ids=positions).logits
    for row in range(3):
        keep = mask[row].bool()
        close(padded[row, keep], model(tokens[row, keep][None]).logits[0])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("told", [False, True], ids=["by positions", "by the collator"])
def test_packed_sequences_give_what_they_give_alone(attention, told):
    """As padding-free training packs them: positions begin anew, and a collator may tell more."""
    model, lengths = with_mixers(attention), torch.tensor([5, 1, 7])
    tokens = torch.randint(50, (1, 13))
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()])[None]
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    others = {}
    if told:
        numbers = torch.arange(3).repeat_interleave(lengths).int()[None]
        others = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "seq_idx": numbers}
        others |= {"max_length_q": 7, "max_length_k": 7}
    packed = model(tokens, position_ids=positions, **others).logits[0]
    alone = [model(part).logits[0] for part in tokens.split(lengths.tolist(), dim=1)]
    close(packed, torch.cat(alone))


def test_positions_tell_of_packed_sequences_in_a_batch_of_one_row_alone():
    """Also where a single row of several is routed to a mixer."""
    x, positions = torch.randn(3, 7, 32).double(), torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    mixers = {"attention": Attention(32, heads=4).double(), "mamba": Mamba(32).double()}
    table = MixerTable.of(torch.tensor([[0, 1, 0]]), mixers=2, batch=3)
    outs = [
        StochasticMixer(mixers, dispatch=dispatch)(x, table=table, position_ids=positions)
        for dispatch in ("host", "dense", "device")
    ]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0])
    torch.testing.assert_close(outs[0][1], mixers["mamba"](x[1:2])[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_follows_the_table_of_the_forward_pass(reentrant):
    tokens = torch.randint(50, (4, 9))
    gradients = []
    for checkpointed in (False, True):
        model, router = supernet()
        model.train()
        if checkpointed:
            options = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            model.enable_input_require_grads()
        for _ in range(2):
            router.draw(batch=4)
            model(tokens, labels=tokens).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected)
    sentence = "checkpointing runs a forward pass again, but the router"
    loss = model(tokens, labels=tokens).loss
    router.draw(batch=4)
    with pytest.raises(ValueError, match=sentence):
        loss.backward()
    losses = []
    for _ in range(2):
        router.draw(batch=4)
        losses.append(model(tokens, labels=tokens).loss)
    with pytest.raises(ValueError, match=sentence):
        sum(losses).backward()


def test_checkpointing_may_be_turned_on_later():
    model, router = supernet()
    model.train()
    tokens = torch.randint(50, (4, 9))
    for step in range(4):
        if step == 2:
            model.gradient_checkpointing_enable()
        router.draw(batch=4)
        model(tokens, labels=tokens).loss.backward()


def test_a_captured_step_forgets_what_was_used():
    """What a CUDA graph replays writes the same memory."""
    model, router = supernet()
    optimizer = GatedAdamW(parameter_groups(model), router=router)
    used = router.used
    router.draw(batch=2)
    optimizer.step()
    assert router.used is used and not used.any()


def test_a_loop_that_knows_no_tables_trains_what_was_used():
    """As Trainer's, whose optimizer steps without a word about tables."""
    models, tokens = [], torch.randint(50, (2, 9))
    for told in (False, True):
        model, router = supernet()
        model.train()
        groups = parameter_groups(model)
        optimizer = GatedAdamW(groups, lr=1e-2, router=None if told else router)
        for _ in range(4):
            used = torch.zeros(2, 2)
            for _micro_batch in range(2):
                used += router.draw(batch=2).count
                model(tokens, labels=tokens).loss.backward()
            if told:
                optimizer.step(used=used)
            else:
                optimizer.step(None)
            optimizer.zero_grad(set_to_none=False)  # or stale flags would do no harm
        models.append(model)
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(ours, theirs)


def test_a_step_without_a_draw_is_refused():
    model, router = supernet()
    optimizer = GatedAdamW(parameter_groups(model), router=router)
    assert isinstance(router.draw(batch=2), MixerTable)
    optimizer.step()
    with pytest.raises(ValueError, match="the router has drawn no table since the last step"):
        optimizer.step()


def test_a_closure_computes_the_gradients_first():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = GatedAdamW([parameter], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = parameter.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    assert (parameter < 1).all()
