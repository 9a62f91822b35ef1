"""The objective of dParallel: the masks, where the two losses look and where gradients flow, and the decoder."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import load_method

dparallel = load_method("dparallel")
MASK = 9


def test_masks_are_complementary_and_hide_all_later_blocks():
    torch.manual_seed(0)
    response = torch.randint(MASK, (500, 12))
    (a, in_a), (b, in_b) = dparallel.mask_semi_autoregressive(response, 4, 0.5, MASK)
    assert not (in_a & in_b).any()
    active = in_a | in_b
    assert (active.sum(1) == 4).all()
    start = active.float().argmax(1)
    assert set(start.tolist()) == {0, 4, 8}, "every block comes up, none of them empty"
    place = torch.arange(12)
    for noisy, masked in ((a, in_a), (b, in_b)):
        later = place >= start[:, None] + 4
        assert ((noisy == MASK) == (masked | later)).all()
        assert (noisy == response)[~(masked | later)].all()
    assert abs(in_a.float().mean() * 3 - 0.5) < 0.03
    share = dparallel.mask_semi_autoregressive(response, 4, 0.2, MASK)[0][1].float().mean() * 3
    assert abs(share - 0.2) < 0.03


def example():
    """Logits (1, 5, 3): right, right, wrong, right but open, wrong and open."""
    logits = torch.tensor([[[3.0, 0, 0], [0, 1, 0], [0, 2, 0], [4, 0, 0], [4, 0, 0]]], requires_grad=True)
    target = torch.tensor([[0, 1, 0, 0, 1]])
    masked = torch.tensor([[True, True, True, False, False]])
    return logits, target, masked


def entropy(logits):
    return torch.distributions.Categorical(logits=logits).entropy()


def test_certainty_is_the_tempered_entropy_of_right_masked_tokens():
    logits, target, masked = example()
    loss = dparallel.certainty_loss(logits, target, masked, temperature=0.5)
    assert torch.allclose(loss, entropy(2 * logits[0, :2]).mean(), atol=1e-6)
    loss.backward()
    assert (logits.grad[0, :2].abs().sum(1) > 0).all()
    assert (logits.grad[0, 2:] == 0).all(), "neither wrong nor unmasked tokens get a gradient"
    step = (logits - 0.1 * logits.grad).detach()
    assert (entropy(step[0, :2]) < entropy(logits.detach()[0, :2])).all(), "a descent step makes them more certain"


def test_everywhere_is_the_ablation():
    logits, target, masked = example()
    loss = dparallel.certainty_loss(logits, target, masked, temperature=0.5, only_correct=False)
    assert torch.allclose(loss, entropy(2 * logits[0, :3]).mean(), atol=1e-6)


@pytest.mark.parametrize("target", [torch.tensor([[2, 2, 2, 0, 0]]), None])
def test_nothing_right_or_nothing_masked_gives_zero(target):
    logits, right, masked = example()
    masked = masked if target is not None else torch.zeros_like(masked)
    loss = dparallel.certainty_loss(logits, right if target is None else target, masked)
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


def test_cross_entropy_is_the_mean_over_the_masked_tokens_of_the_whole_batch():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 4, 6, requires_grad=True), torch.randint(6, (2, 4))
    masked = torch.tensor([[True, True, True, False], [False, False, True, False]])
    loss = dparallel.cross_entropy_loss(logits, target, masked)
    assert torch.allclose(loss, F.cross_entropy(logits[masked], target[masked]))
    loss.backward()
    assert (logits.grad[~masked] == 0).all()
    assert dparallel.cross_entropy_loss(logits, target, torch.zeros_like(masked)) == 0


def test_teacher_loss_is_lladas_bound_on_average():
    """Summed over all masks with their exact weights it equals E_t [sum of masked losses / (t L)], t uniform."""
    L = 3
    torch.manual_seed(0)
    logits, target = torch.randn(1, L, 5), torch.tensor([[0, 3, 1]])
    each = F.cross_entropy(logits[0], target[0], reduction="none")
    ours = llada = 0.0
    for bits in range(1, 2**L):
        masked = torch.tensor([[bool(bits >> i & 1) for i in range(L)]])
        n = int(masked.sum())
        ours += dparallel.masked_diffusion_loss(logits, target, masked) / L / math.comb(L, n)
        weight = math.factorial(n - 1) * math.factorial(L - n) / math.factorial(L)    # integral of t^(n-1) (1-t)^(L-n)
        llada += weight * (each * masked[0]).sum() / L
    assert torch.allclose(ours, llada, atol=1e-6)


def table_model(logits):
    """A model that gives the same logits (L, V) whatever the tokens, behind a prompt of two; it counts its rows."""
    def model(tokens):
        model.rows += len(tokens)
        return F.pad(logits, (0, 0, 2, 0)).expand(len(tokens), -1, -1)
    model.rows = 0
    return model


def test_decoder_keeps_the_certain_tokens_and_at_least_one():
    sharp, flat = torch.tensor([9.0, 0, 0, 0]), torch.tensor([0.4, 0, 0.5, 0])
    logits = torch.stack([flat, sharp, flat, sharp, sharp, sharp])       # the last logit is that of the mask
    model, prompts = table_model(logits), torch.zeros(3, 2, dtype=torch.long)
    for threshold, calls in ((0.5, 3 + 1), (math.inf, 2), (-1.0, 6)):
        model.rows = 0
        response, count = dparallel.decode(model, prompts, 6, 3, 3, threshold)
        assert response.tolist() == [[2, 0, 2, 0, 0, 0]] * 3
        assert count.tolist() == [calls] * 3 and model.rows == 3 * calls, threshold
    assert dparallel.decode(model, prompts, 6, 3, 3)[1].tolist() == [6] * 3
    in_one_block = dparallel.decode(model, prompts, 6, 6, 3, 0.5)[1]       # the four sharp ones at once
    assert in_one_block.tolist() == [3] * 3


def test_decoder_finishes_a_block_before_the_next_and_reports_entropies():
    logits = torch.stack([torch.tensor([0.5, 0, 0]), torch.tensor([0.5, 0, 0]), torch.tensor([9.0, 0, 0])])
    logits = logits.repeat_interleave(2, 0)[:6][[0, 1, 4, 5]]        # uncertain block, certain block
    trace, seen = [], []

    def model(tokens):
        seen.append(tokens[0, 1:].tolist())
        return F.pad(logits, (0, 0, 1, 0)).expand(len(tokens), -1, -1)
    dparallel.decode(model, torch.zeros(1, 1, dtype=torch.long), 4, 2, 2, 0.1, trace)
    assert seen == [[2, 2, 2, 2], [0, 2, 2, 2], [0, 0, 2, 2]], "the certain second block waits for the first"
    assert torch.allclose(trace[1][0, 1], entropy(logits[1, :2])) and trace[1][0, 0] == 0


def test_calls_are_counted_for_each_response():
    """The prompt's token says whether the model is sure: a sure response takes one call, an unsure one four."""
    def model(tokens):
        return tokens[:, :1, None].float() * torch.tensor([9.0, 0, 0]) + torch.zeros(len(tokens), 5, 3)
    calls = dparallel.decode(model, torch.tensor([[1], [0], [1]]), 4, 4, 2, 0.1)[1]
    assert calls.tolist() == [1, 4, 1]


def test_one_token_a_call_goes_by_probability_and_the_threshold_by_entropy():
    """Two positions whose order by the two rules differs."""
    by_probability = torch.tensor([0.50, 0.50, 0.0, 0.0, 0.0]).clamp_min(1e-9).log()
    by_entropy = torch.tensor([0.55, 0.1125, 0.1125, 0.1125, 0.1125]).log()
    logits = torch.cat([torch.stack([by_probability, by_entropy]), torch.full((2, 1), -99.0)], 1)
    seen = []

    def model(tokens):
        seen.append((tokens[0, 1:] == 5).tolist())
        return F.pad(logits, (0, 0, 1, 0)).expand(len(tokens), -1, -1)
    prompt = torch.zeros(1, 1, dtype=torch.long)
    dparallel.decode(model, prompt, 2, 2, 5)
    assert seen[1] == [True, False]
    seen.clear()
    dparallel.decode(model, prompt, 2, 2, 5, 0.0)
    assert seen[1] == [False, True]


def test_width_and_data_are_checked():
    common = dparallel.common
    with pytest.raises(common.UserError, match="multiple of 4"):
        dparallel.make_model(dparallel.Config(width=30), None, 10)
    with pytest.raises(common.UserError, match="arithmetic"):
        dparallel.run(dparallel.Config(data="moons"), None)
