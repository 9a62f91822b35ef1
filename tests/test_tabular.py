"""The biased table: rates and label bias as promised, proxies, merit free of the group, the coder's round trip."""
import pytest
import torch

from toy_data.tabular import Coder, Hiring, auc, checked, fairness, scores, split


@pytest.fixture(scope="module")
def rows():
    torch.manual_seed(0)
    return Hiring().sample(100_000)


def test_shapes_and_codes(rows):
    x, *flags = rows
    assert x.shape == (100_000, 10) and x.dtype == torch.float32 and x.isfinite().all()
    assert all(f.shape == (100_000,) and f.dtype == torch.int64 and set(f.unique().tolist()) == {0, 1} for f in flags)
    for column, k in zip(x.unbind(1), Hiring.levels):
        assert not k or set(column.unique().tolist()) == set(range(k))


@pytest.mark.parametrize("rates, share", [((0.25, 0.65), 0.5), ((0.6, 0.3), 0.2)])
def test_label_rates(rates, share):
    torch.manual_seed(1)
    _, protected, labels, deserved = Hiring(rates, share).sample(100_000)
    assert abs(protected.float().mean() - share) < 0.01
    for group in (0, 1):
        assert abs(labels[protected == group].float().mean() - rates[group]) < 0.01
        middle = (1 - share) * rates[0] + share * rates[1]
        assert abs(deserved[protected == group].float().mean() - middle) < 0.01      # the same in both groups


def test_bias_is_one_sided(rows):
    """The higher bar takes deserved labels from group 0 and gives none; the lower one does the opposite."""
    _, protected, labels, deserved = rows
    assert (labels <= deserved)[protected == 0].all() and (labels >= deserved)[protected == 1].all()
    assert (labels != deserved).float().mean() > 0.1


def test_only_proxies_know_the_group(rows):
    x, protected, *_ = rows
    difference = x[protected == 1].mean(0) - x[protected == 0].mean(0)
    for i, gap in enumerate((difference / x.std(0)).tolist()):
        assert gap > 0.9 if i in Hiring.proxies else abs(gap) < 0.03, Hiring.columns[i]
    torch.manual_seed(0)
    x, protected, *_ = Hiring(proxy=0).sample(50_000)
    assert ((x[protected == 1].mean(0) - x[protected == 0].mean(0)) / x.std(0)).abs().max() < 0.04


def test_merit_decides_within_a_group(rows):
    x, protected, labels, _ = rows
    for group in (0, 1):
        table = torch.cat([x, labels[:, None]], 1)[protected == group].T
        correlation = torch.corrcoef(table)[-1, :-1]
        assert correlation[2] > 0.5 and correlation[[5, 9]].abs().max() < 0.02


def test_reproducible_from_the_global_stream():
    tables = []
    for _ in range(2):
        torch.manual_seed(3)
        tables.append(Hiring().sample(50))
    assert all(torch.equal(a, b) for a, b in zip(*tables))


def test_coder_round_trip(rows):
    x = rows[0][:500]
    coder = Coder(x, Hiring.levels)
    code = coder.encode(x)
    assert code.shape == (500, coder.width) == (500, 6 + 2 + 3 + 2 + 4)
    assert torch.allclose(code[:, :6].mean(0), torch.zeros(6), atol=1e-5)
    assert torch.allclose(code[:, :6].std(0), torch.ones(6), atol=1e-5)
    assert torch.equal(code[:, 6:].sum(1), torch.full((500,), 4.0))
    assert torch.allclose(coder.decode(code), x, atol=1e-5)


def test_coder_keeps_the_order_of_mixed_columns():
    x = torch.tensor([[1.0, 0.5, 0.0], [2.0, -0.5, 1.0], [0.0, 1.5, 1.0]])
    coder = Coder(x, (3, 0, 2))
    assert coder.numbers == 1 and coder.sizes == [3, 2]
    assert torch.equal(coder.encode(x)[:, 1:], torch.tensor([[0., 1, 0, 1, 0], [0, 0, 1, 0, 1], [1, 0, 0, 0, 1]]))
    assert torch.allclose(coder.decode(coder.encode(x)), x)
    with pytest.raises(ValueError):
        Coder(x, (3, 0))


def test_constant_column_stays_finite():
    assert Coder(torch.ones(4, 1), (0,)).encode(torch.ones(4, 1)).eq(0).all()


def test_sampled_codes_follow_means_spread_and_logits():
    torch.manual_seed(0)
    coder = Coder(torch.tensor([[0.0, 0], [2, 1], [4, 2]]), (0, 3))
    output = torch.tensor([[0.5, 0.0, 1.0, -50.0]]).repeat(20_000, 1)
    code = coder.sample(output, torch.tensor([0.2]))
    assert abs(code[:, 0].mean() - 0.5) < 0.01 and abs(code[:, 0].std() - 0.2) < 0.01
    assert torch.equal(code[:, 1:].sum(1), torch.ones(20_000))
    assert torch.allclose(code[:, 1:].mean(0), output[0, 1:].softmax(0), atol=0.02)


def test_fairness_by_hand():
    protected = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    labels = torch.tensor([1, 1, 0, 0, 1, 1, 0, 0])
    predicted = torch.tensor([1, 0, 0, 0, 1, 1, 1, 0])
    assert fairness(predicted, protected, labels) == dict(acc=0.75, parity_gap=0.5, odds_gap=0.5)
    found = fairness(labels, protected, labels)
    assert found == dict(acc=1.0, parity_gap=0.0, odds_gap=0.0)


def test_auc_against_all_pairs():
    torch.manual_seed(0)
    score, positive = torch.randn(200), (torch.rand(200) < 0.3).long()
    pairs = score[positive == 1][:, None] > score[positive == 0]
    assert abs(auc(score, positive) - pairs.float().mean()) < 1e-6
    assert auc(positive.float(), positive) == 1 and auc(-positive.float(), positive) == 0


def test_split_of_an_own_table(rows):
    x, protected, labels, _ = (a[:400] for a in rows)
    torch.manual_seed(0)
    train, test, levels = split(x, protected.bool(), labels.double(), list(Hiring.levels))
    assert len(train[0]) == 300 and len(test[0]) == 100 and levels == Hiring.levels
    together = torch.cat([train[0], test[0]])
    assert torch.equal(together.sort(0)[0], x.sort(0)[0]) and test[1].dtype == test[2].dtype == torch.int64
    guessed = checked(x, protected, labels)[3]
    assert guessed == (0, 0, 0, 0, 0, 0, 2, 0, 2, 0)        # a category of three is taken for a number


@pytest.mark.parametrize("changes, said", [
    (dict(protected=torch.tensor([0, 1, 2, 1])), "protected"), (dict(labels=torch.tensor([0, 1, 1])), "3 values"),
    (dict(labels=torch.tensor([1, 1, 0, 0])), "both labels"), (dict(levels=[0, 1]), "levels"),
    (dict(levels=[0, 0, 0]), "levels"), (dict(levels=[2, 0]), "column 0")])
def test_unfit_tables(changes, said):
    table = dict(x=torch.tensor([[0.5, 1], [1, 0], [2, 1], [3, 0]]), protected=torch.tensor([0, 0, 1, 1]),
                 labels=torch.tensor([0, 1, 0, 1]))
    assert len(checked(**table)) == 4
    with pytest.raises(ValueError, match=said):
        checked(**table | changes)


def test_scores_learn_a_rule_and_tell_no_group_from_noise():
    torch.manual_seed(0)
    x = torch.randn(2000, 3)
    y = (x[:, 0] * x[:, 1] > 0).long()      # a linear probe would find nothing
    assert auc(scores(x[:1000], y[:1000], x[1000:]), y[1000:]) > 0.95
    noise = torch.randint(2, (2000,))
    assert abs(auc(scores(x[:1000], noise[:1000], x[1000:]), noise[1000:]) - 0.5) < 0.06
