"""toy_data/preferences.py: the split, the writer's law, the reward's scale, noisy labels, the best response."""
import itertools

import pytest
import torch

from toy_data.preferences import EOS, Preferences, in_test


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    return Preferences(tokens=5, prompt_length=3, length=4, sharpness=2.0)


def test_splits_share_no_prompt_and_test_is_a_tenth(task):
    train, test = task.prompts(500), task.prompts(200, "test")
    assert train.shape == (500, 3) and not in_test(train).any() and in_test(test).all()
    whole = torch.cartesian_prod(*[torch.arange(10)] * 3)
    assert in_test(whole).float().mean().item() == pytest.approx(0.1, abs=0.04)
    with pytest.raises(ValueError, match="split"):
        task.prompts(3, "valid")


def test_same_stream_same_task():
    drawn = []
    for _ in range(2):
        torch.manual_seed(7)
        drawn.append(Preferences().pairs(20))
    assert all(torch.equal(a, b) for a, b in zip(*drawn))


def test_quality_by_hand_and_reward_is_its_mean(task):
    prompts, responses = task.sample(6)
    q = task.scores(prompts)
    for i, (row, text) in enumerate(zip(q, responses.tolist())):
        by_hand = [row[before, token] for before, token in zip([task.tokens, *text], text)]
        torch.testing.assert_close(task.quality(prompts, responses)[i], torch.stack(by_hand))
    torch.testing.assert_close(task.reward(prompts, responses), task.quality(prompts, responses).mean(1))


def test_best_response_against_all_responses(task):
    prompt = task.prompts(1, "test")
    every = torch.tensor(list(itertools.product(range(5), repeat=4)))
    rewards = task.reward(prompt.expand(len(every), -1), every)
    assert task.reward(prompt, task.best(prompt)).item() == pytest.approx(rewards.max().item(), abs=1e-5)


def test_expected_reward_is_the_sum_over_all_responses(task):
    prompt = task.prompts(1)
    every = torch.tensor(list(itertools.product(range(5), repeat=4)))
    law = task.transitions(prompt)[0]
    before = torch.cat([torch.full((len(every), 1), 5), every[:, :-1]], 1)
    p = law[before, every].prod(1)
    assert p.sum().item() == pytest.approx(1.0, abs=1e-5)
    mean = (p * task.reward(prompt.expand(len(every), -1), every)).sum()
    torch.testing.assert_close(task.expected(prompt)[0], mean, rtol=1e-4, atol=1e-5)


def test_scale_writer_zero_best_one(task):
    prompts = task.prompts(4000)
    assert task.reward(prompts, task.write(prompts)).mean().item() == pytest.approx(0, abs=0.05)
    assert task.reward(prompts, task.best(prompts)).mean().item() == pytest.approx(1, abs=0.05)


def test_writer_follows_its_transitions(task):
    prompts = task.prompts(1).expand(20000, -1)
    first = task.write(prompts)[:, 0].bincount(minlength=5) / 20000
    torch.testing.assert_close(first, task.transitions(prompts[:1])[0, -1], rtol=0, atol=0.015)


@pytest.mark.parametrize("flip", [0.0, 0.1, 1.0])
def test_labels_are_wrong_as_often_as_asked(task, flip):
    prompts, chosen, rejected = task.pairs(4000, flip)
    difference = task.reward(prompts, chosen) - task.reward(prompts, rejected)
    unequal = difference[difference != 0]
    assert (unequal < 0).float().mean().item() == pytest.approx(flip, abs=0.02)


def test_skill_raises_the_writers_reward():
    expected = []
    for skill in (0.0, 2.0):
        torch.manual_seed(3)
        task = Preferences(skill=skill)
        expected.append(task.zero)      # the writer's mean of q before the scale is set
    assert expected[1] > expected[0] + 0.1


def test_eos_is_no_token_and_too_few_prompts_are_refused(task):
    assert EOS not in range(task.tokens)
    with pytest.raises(ValueError, match="too few"):
        Preferences(tokens=3, prompt_length=1)
