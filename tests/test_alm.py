"""ALM: alignment by hand and against a scan, likelihoods of chunks, the binary loss, its limits and gradients."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import load_method

import common
from toy_data import grammar

alm = load_method("alm")


def ends_of(*rows):
    """Token lengths of several texts to padded ends (B, tokens)."""
    ends = [torch.tensor(row).cumsum(0) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(ends, batch_first=True)


def scan(a, b):
    """Chunks (start and end of the tokens of either sequence) of two lists of token lengths, by two pointers."""
    chunks, i, j, start = [], 0, 0, (0, 0)
    while i < len(a) and j < len(b):
        if sum(a[:i + 1]) == sum(b[:j + 1]):
            i, j = i + 1, j + 1
            chunks.append((start[0], i, start[1], j))
            start = i, j
        elif sum(a[:i + 1]) < sum(b[:j + 1]):
            i += 1
        else:
            j += 1
    return chunks


def aligned(teacher, student, length):
    boundaries = alm.common_boundaries(teacher, student, length)
    return boundaries, alm.chunk_index(teacher, boundaries), alm.chunk_index(student, boundaries)


# ------------------------------------------------------------------------------------------- alignment

def test_chunks_of_hand_made_cases():
    # "the cats": the| |cats  against  t|he |cat|s, one text; then equal cuts; then nothing in common but the end
    teacher, student = ends_of([3, 1, 4], [2, 2, 4], [3, 5]), ends_of([1, 3, 3, 1], [2, 2, 4], [1, 1, 2, 4])
    student[2] = torch.tensor([1, 2, 4, 8])
    boundaries, t, s = aligned(teacher, student, 8)
    assert [b.nonzero()[:, 0].tolist() for b in boundaries] == [[4, 8], [2, 4, 8], [8]]
    assert t.tolist() == [[0, 0, 1], [0, 1, 2], [0, 0, -1]]
    assert s.tolist() == [[0, 0, 1, 1], [0, 1, 2, -1], [0, 0, 0, 0]]


def test_letters_against_pieces_give_one_chunk_a_piece_and_the_converse():
    letters, pieces = ends_of([1] * 6), ends_of([2, 1, 3])
    for teacher, student in ((letters, pieces), (pieces, letters)):
        _, t, s = aligned(teacher, student, 6)
        assert {str(t[0].tolist()), str(s[0].tolist())} == {str([0, 0, 1, 2, 2, 2]), str([0, 1, 2])}


def test_alignment_is_that_of_a_scan_on_random_cuts():
    torch.manual_seed(0)
    for _ in range(30):
        rows = []
        for _ in range(2):
            cuts = (torch.rand(19) < 0.5).nonzero()[:, 0] + 1
            rows.append(torch.tensor([0, *cuts.tolist(), 20]).diff().tolist())
        _, t, s = aligned(ends_of(rows[0]), ends_of(rows[1]), 20)
        found = [tuple((x[0] == i).nonzero()[:, 0].tolist() for x in (t, s)) for i in range(int(t.max()) + 1)]
        assert found == [(list(range(a, b)), list(range(c, d))) for a, b, c, d in scan(*rows)]


def test_chunks_cover_the_same_characters_of_real_tokens():
    torch.manual_seed(1)
    source = grammar.Markov()
    text = source.sample(20, 30)
    one, two = grammar.learn(text, source.alphabet, 5), grammar.learn(text, source.alphabet, 20, longest=3)
    (u, ends_u), (v, ends_v) = one.encode(text), two.encode(text)
    boundaries, t, s = aligned(ends_u, ends_v, 30)
    for row in range(20):
        for i in range(int(boundaries[row].sum())):
            first = "".join(one.pieces[k] for k in u[row][t[row] == i])
            assert first and first == "".join(two.pieces[k] for k in v[row][s[row] == i])


def test_merging_leaves_only_boundaries_behind_unambiguous_tokens_and_the_last_one():
    tokenizer = grammar.Tokenizer("abc", ("ab",))           # only "a" can go on
    text = torch.tensor([[0, 2, 0, 1, 1, 0, 0, 2, 0]])      # a|c|ab|b|a|a|c|a
    tokens, ends = tokenizer.encode(text)
    letters = torch.arange(1, 10)[None]
    boundaries = alm.common_boundaries(letters, ends, 9)
    assert boundaries[0].nonzero()[:, 0].tolist() == [1, 2, 4, 5, 6, 7, 8, 9]
    merged = alm.merge(boundaries, ends, tokenizer.open[tokens])
    assert merged[0].nonzero()[:, 0].tolist() == [2, 4, 5, 8, 9]
    assert alm.chunk_index(ends, merged).tolist() == [[0, 0, 1, 2, 3, 3, 3, 4]]


def test_merged_chunks_have_the_same_likelihood_in_both_tokenisations_of_one_law():
    """Letters a, b, each 1/2 and independent, as a model over the tokens a, b, ab. No b follows the token a, so
    P(a) = P(letters aa) = 1/4: minimal chunks are biased, merged ones are not."""
    tokenizer = grammar.Tokenizer("ab", ("ab",))
    text = torch.tensor([[0, 0, 1, 1, 0, 0, 0, 1]])         # a|ab|b|a|a|ab
    tokens, ends = tokenizer.encode(text)
    assert tokens.tolist() == [[0, 2, 1, 0, 0, 2]]
    after_a, free = {0: 1 / 2, 2: 1 / 2}, {0: 1 / 4, 1: 1 / 2, 2: 1 / 4}       # next token after a, after ab or b
    student, before = [], None
    for token in tokens[0].tolist():
        student.append(math.log((after_a if before == 0 else free)[token]))
        before = token
    letters, log_half = torch.arange(1, 9)[None], torch.full((1, 8), math.log(0.5))
    gaps = []
    minimal = alm.common_boundaries(letters, ends, 8)
    for boundaries in (minimal, alm.merge(minimal, ends, tokenizer.open[tokens])):
        n = int(boundaries.sum())
        l_t = alm.chunk_log_likelihood(log_half, alm.chunk_index(letters, boundaries), n)
        l_s = alm.chunk_log_likelihood(torch.tensor([student]), alm.chunk_index(ends, boundaries), n)
        gaps.append((l_t - l_s).abs())
    assert gaps[0].max() > 0.6 and gaps[1].max() < 1e-6 and gaps[1].shape == (1, 3)


# ------------------------------------------------------------------------------------------- likelihoods and loss

def test_chunk_likelihood_is_the_product_of_the_token_probabilities():
    log_p = torch.tensor([[0.5, 0.25, 0.1, 0.9]]).log().requires_grad_()
    l = alm.chunk_log_likelihood(log_p, torch.tensor([[0, 0, 1, -1]]), 3)
    assert torch.allclose(l, torch.tensor([[math.log(0.125), math.log(0.1), 0.0]]))
    l[0, 0].backward()
    assert log_p.grad.tolist() == [[1, 1, 0, 0]]


def test_log1mexp_near_and_far():
    x = -torch.logspace(-12, 2, 57, dtype=torch.float64)
    reference = torch.tensor([math.log(-math.expm1(v)) if v > -1e-3 else math.log1p(-math.exp(v)) for v in x.tolist()],
                             dtype=torch.float64)
    assert torch.allclose(alm.log1mexp(x), reference, rtol=1e-10)
    assert torch.isfinite(alm.log1mexp(torch.tensor([-1e-8, -80.0]))).all()


def test_loss_is_the_binary_cross_entropy_of_tempered_likelihoods():
    torch.manual_seed(0)
    l_t, l_s = -3 * torch.rand(2, 4, 5, dtype=torch.float64)
    there = torch.rand(4, 5) < 0.7
    for tau in (1.0, 5.0):
        y_t, y_s = ((l / tau - 1e-6).exp() for l in (l_t, l_s))
        expected = F.binary_cross_entropy(y_s[there], y_t[there])
        assert torch.allclose(alm.alm_loss(l_t, l_s, there, tau).double(), expected, rtol=1e-5)


def test_gradient_goes_to_the_student_and_is_zero_where_the_likelihoods_agree():
    l_t = torch.tensor([[-2.0, -5.0, -0.3]], requires_grad=True)
    l_s = torch.tensor([[-2.0, -4.0, -0.9]], requires_grad=True)
    alm.alm_loss(l_t, l_s, torch.ones(1, 3, dtype=torch.bool), 100.0).backward()
    assert l_t.grad is None
    assert abs(l_s.grad[0, 0]) < 1e-7 and l_s.grad[0, 1] > 1e-4 and l_s.grad[0, 2] < -1e-4


@pytest.mark.parametrize("tau, near", [(100.0, 0.05), (1000.0, 0.005)])
def test_at_high_temperature_it_compares_log_likelihoods(tau, near):
    """tau dL/da_S -> 1 - a_T / a_S with a = -l."""
    a_t, a_s = torch.tensor([[1.0, 4.0, 9.0, 2.0]]), torch.tensor([[2.0, 3.0, 5.0, 7.0]], requires_grad=True)
    (4 * tau * alm.alm_loss(-a_t, -a_s, torch.ones(1, 4, dtype=torch.bool), tau, eps=1e-9)).backward()
    limit = 1 - a_t / a_s.detach()
    assert ((a_s.grad - limit).abs() <= near * limit.abs() + 1e-3).all()


def test_at_temperature_1_a_long_chunk_has_no_gradient_but_at_100_it_has():
    there = torch.ones(1, 1, dtype=torch.bool)
    size = []
    for tau in (1.0, 100.0):
        l_s = torch.tensor([[-20.0]], requires_grad=True)
        (tau * alm.alm_loss(torch.tensor([[-12.0]]), l_s, there, tau)).backward()
        size.append(l_s.grad.abs().item())
    assert size[0] < 1e-4 and abs(size[1] - (1 - 12 / 20)) < 0.05


def test_absent_chunks_do_not_count_and_certain_ones_stay_finite():
    l_t, l_s = torch.tensor([[-1.0, 0.0]]), torch.tensor([[-2.0, 0.0]], requires_grad=True)
    one = torch.tensor([[True, False]])
    alone = alm.alm_loss(l_t[:, :1], l_s[:, :1], one[:, :1])
    assert torch.allclose(alm.alm_loss(l_t, l_s, one), alone)
    loss = alm.alm_loss(l_t, l_s, torch.ones_like(one))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(l_s.grad).all()


def test_uld_ignores_the_order_of_the_vocabulary_and_fills_the_smaller_one_up():
    torch.manual_seed(0)
    logits, mask = torch.randn(2, 3, 5, requires_grad=True), torch.ones(2, 3, dtype=torch.bool)
    own = logits.detach()[..., torch.randperm(5)].softmax(-1).sort(-1, descending=True)[0]
    assert alm.uld_loss(own, logits, mask) < 1e-6
    small = torch.tensor([1.0, 0.0]).expand(2, 4, 2)       # a teacher with 2 tokens and one position more
    loss = alm.uld_loss(small, logits, mask)
    assert torch.allclose(loss, 2 * (1 - logits.softmax(-1).max(-1)[0]).mean())
    large = torch.tensor([0.5] + [0.1] * 5).expand(2, 2, 6)
    expected = (logits[:, :2].softmax(-1).sort(-1, descending=True)[0] - large[..., :5]).abs().sum(-1).mean() + 0.1
    assert torch.allclose(alm.uld_loss(large, logits, mask), expected)
    loss.backward()
    assert logits.grad.abs().sum() > 0


def test_equalised_gradients_have_equal_norms_whatever_the_scale_of_the_losses():
    torch.manual_seed(0)
    w, b = torch.randn(4, requires_grad=True), torch.randn(2, requires_grad=True)

    def losses(scale):
        return [scale * (w.square().sum() + b.sum()), (w * torch.arange(4.0)).sum() + b.prod()]
    found = alm.equalised_gradient(losses(1.0), [w, b])
    scaled = alm.equalised_gradient(losses(1000.0), [w, b])
    assert all(torch.allclose(x, y, rtol=1e-4, atol=1e-6) for x, y in zip(found, scaled))
    expected = 0
    for loss in losses(1.0):
        g = torch.cat(torch.autograd.grad(loss, [w, b]))
        expected = expected + g / g.norm()
    assert torch.allclose(torch.cat(found), expected, atol=1e-6) and w.grad is None


# ------------------------------------------------------------------------------------------- the corpus

@pytest.mark.parametrize("pairs", [(0, 8), (8, 0), (5, 8)])
def test_a_corpus_holds_the_teachers_likelihood_of_whole_texts(pairs):
    """Without the end of a text: the chunks' likelihoods add up to the tokens', the padding's token left out."""
    torch.manual_seed(0)
    source = grammar.Markov()
    text = source.sample(30, 16)
    cut_t, cut_s = (grammar.learn(text, source.alphabet, n) for n in pairs)
    teacher = common.Transformer(cut_t.size, 16, 1, 4, 17)
    corpus = alm.prepare(teacher, cut_t, cut_s, text, "cpu")
    tokens, ends = cut_s.encode(text)
    assert (corpus.tokens == tokens).all() and (corpus.mask == (ends > 0)).all()
    for kind in corpus[2:4]:
        assert (kind.there.sum(1) == kind.index.max(1)[0] + 1).all() and (kind.teacher[kind.there] < 0).all()
        assert (kind.teacher[~kind.there] == 0).all()
    whole = corpus.minimal.teacher.sum(1)
    assert torch.allclose(whole, corpus.unbiased.teacher.sum(1), atol=1e-4)
    u = cut_t.encode(text)[0]
    logits = alm.logits_of(teacher, u, cut_t.bos)[..., :cut_t.bos].log_softmax(-1)
    by_hand = [sum(logits[i, k, token] for k, token in enumerate(row) if token != cut_t.bos)
               for i, row in enumerate(u.tolist())]
    assert torch.allclose(whole, torch.stack(by_hand), atol=1e-4)


@pytest.mark.parametrize("pairs", [(0, 8), (8, 0), (5, 8)])
def test_unbiased_chunks_of_a_corpus_end_in_neither_sequence_in_a_token_that_can_go_on(pairs):
    torch.manual_seed(0)
    source = grammar.Markov()
    text = source.sample(30, 16)
    cuts = [grammar.learn(text, source.alphabet, n) for n in pairs]
    corpus = alm.prepare(common.Transformer(cuts[0].size, 8, 1, 4, 17), *cuts, text, "cpu")
    fewer = 0
    for row, string in enumerate(grammar.show(text, source.alphabet)):
        ends = []           # of either tokenizer: the offsets behind tokens, all and those that cannot go on
        for cut in cuts:
            pieces = cut.split(string)
            sealed = [not any(q != p and q.startswith(p) for q in cut.pieces) for p in pieces]
            offsets = torch.tensor([len(p) for p in pieces]).cumsum(0).tolist()
            ends.append((set(offsets), {e for e, ok in zip(offsets, sealed) if ok} | {16}, offsets))
        for which, kind in enumerate((corpus.minimal, corpus.unbiased)):
            shared = sorted(ends[0][which] & ends[1][which])
            expected = [next(i for i, end in enumerate(shared) if e <= end) for e in ends[1][2]]
            assert kind.index[row][corpus.mask[row]].tolist() == expected
            assert int(kind.there[row].sum()) == len(shared)
        fewer += len(ends[0][0] & ends[1][0]) - len(shared)
    assert fewer > 20


def test_the_students_likelihoods_are_sums_over_its_own_tokens():
    torch.manual_seed(0)
    source = grammar.Markov()
    text = source.sample(10, 12)
    cut = grammar.learn(text, source.alphabet, 6)
    corpus = alm.prepare(common.Transformer(7, 8, 1, 4, 13), grammar.Tokenizer(source.alphabet), cut, text, "cpu")
    student = common.Transformer(cut.size, 8, 1, 4, 13)
    log_p, minimal, unbiased = alm.likelihoods(student, corpus, cut.bos)
    inputs = torch.cat([torch.full((10, 1), cut.bos), corpus.tokens], 1)
    by_hand = student(inputs).log_softmax(-1)[:, :-1].gather(2, corpus.tokens[..., None])[..., 0]
    assert torch.allclose(log_p, by_hand, atol=1e-5)
    for l in (minimal, unbiased):
        assert torch.allclose(l.sum(1), (log_p * corpus.mask).sum(1), atol=1e-4)


def test_pick_keeps_rows_together():
    torch.manual_seed(0)
    source = grammar.Markov()
    text = source.sample(10, 12)
    cut = grammar.learn(text, source.alphabet, 6)
    corpus = alm.prepare(common.Transformer(7, 8, 1, 4, 13), grammar.Tokenizer(source.alphabet), cut, text, "cpu")
    rows = torch.tensor([3, 3, 7])
    part = alm.pick(corpus, rows)
    assert (part.tokens == corpus.tokens[rows]).all()
    assert (part.unbiased.teacher == corpus.unbiased.teacher[rows]).all()
