"""The text domain: the law, misprints, tokenizers, and texts of one's own."""
import pytest
import torch

import common
from toy_data import grammar


def test_law_is_one_of_probabilities_and_the_texts_follow_it():
    torch.manual_seed(0)
    source = grammar.Markov(4, choices=2, tail=0.1)
    assert torch.allclose(source.law.sum(2), torch.ones(4, 4)) and (source.follow.sum(2) == 2).all()
    text = source.sample(4000, 12)
    assert text.shape == (4000, 12) and text.min() == 0 and text.max() == 3
    a, b, c = (text[:, i:i + 10].flatten() for i in range(3))
    counts = torch.zeros(4, 4, 4).index_put_((a, b, c), torch.ones(len(a)), accumulate=True)
    often = counts.sum(2) > 1500
    assert often.sum() > 4
    share = counts / counts.sum(2, keepdim=True)
    assert (share - source.law)[often].abs().max() < 0.05
    assert (source.log_probs(text).exp() - source.law[text[:, :-2], text[:, 1:-1], text[:, 2:]]).abs().max() < 1e-6
    assert abs(source.allowed(text).mean() - 0.95) < 0.01      # tail 0.1, half of it on letters that are allowed


def test_allowed_counts_letters_from_the_third_on_and_missing_ones_as_wrong():
    source = grammar.Markov(3, choices=1, tail=0.0)
    text = source.sample(5, 10)
    assert (source.allowed(text) == 1).all()
    text[:, -1] = (text[:, -1] + 1) % 3
    assert torch.allclose(source.allowed(text), torch.tensor(7 / 8))
    text[:, -1] = -1
    assert torch.allclose(source.allowed(text), torch.tensor(7 / 8))


def test_misprints_have_the_rate_asked_for():
    text = torch.zeros(1000, 30, dtype=torch.long)
    changed = (grammar.misprint(text, 0.3, 4) != text).float().mean().item()
    assert abs(changed - 0.3 * 3 / 4) < 0.01
    assert (grammar.misprint(text, 0.0, 4) == text).all()


def test_tokens_of_a_hand_made_text():
    tokenizer = grammar.Tokenizer("abc", ("ab", "abc", "cc"))
    assert tokenizer.split("abcabaccc") == ["abc", "ab", "a", "cc", "c"]
    text = torch.tensor([[0, 1, 2, 0, 1, 0, 2, 2, 2], [2, 2, 2, 2, 2, 2, 2, 2, 2]])
    tokens, ends = tokenizer.encode(text)
    assert tokens.tolist() == [[4, 3, 0, 5, 2], [5, 5, 5, 5, 2]]
    assert ends.tolist() == [[3, 5, 6, 8, 9], [2, 4, 6, 8, 9]]
    assert tokenizer.open.tolist() == [True, False, True, True, False, False, False]    # a, c and ab can go on
    tokens, ends = tokenizer.encode(torch.tensor([[0, 1, 2], [1, 1, 1]]))
    assert tokens.tolist() == [[4, 6, 6], [1, 1, 1]] and ends.tolist() == [[3, 0, 0], [1, 2, 3]]


@pytest.mark.parametrize("longer, longest", [(0, 2), (5, 2), (14, 4)])
def test_decode_undoes_encode(longer, longest):
    text = grammar.Markov().sample(50, 20)
    tokenizer = grammar.learn(text, "abcdef", longer, longest)
    assert len(tokenizer.pieces) == 6 + longer and len(set(tokenizer.pieces)) == len(tokenizer.pieces)
    assert max(map(len, tokenizer.pieces)) <= longest
    tokens, ends = tokenizer.encode(text)
    assert (tokenizer.decode(tokens, 20) == text).all() and (ends.max(1)[0] == 20).all()
    assert (tokenizer.decode(tokens, 7) == text[:, :7]).all()
    assert (tokenizer.decode(tokens, 22)[:, 20:] == -1).all()
    with_bos = torch.cat([torch.full((50, 1), tokenizer.bos), tokens], 1)
    assert (tokenizer.decode(with_bos, 20) == text).all()


def test_learning_takes_the_most_frequent_pair_and_stops_when_there_is_none():
    text = torch.tensor([[0, 1, 0, 1, 0, 1, 2, 2]])             # abababcc
    assert grammar.learn(text, "abc", 1).pieces[3:] == ("ab",)
    assert grammar.learn(text, "abc", 2, longest=4).pieces[3:] == ("ab", "abab")
    assert set(grammar.learn(text, "abc", 50).pieces[3:]) <= {"ab", "ba", "bc", "cc"}


def test_own_text(tmp_path):
    path = tmp_path / "my.txt"
    path.write_text("Straße, two lines.\n" * 60 + "Z" * 130, encoding="utf-8")
    book = grammar.read(str(path))
    assert "ß" in book.alphabet and "\n" in book.alphabet
    text = book.sample(20, 30)
    assert text.shape == (20, 30)
    whole = path.read_text(encoding="utf-8")
    assert all(s in whole and "ZZ" not in s for s in grammar.show(text, book.alphabet))
    assert set(grammar.show(book.sample(20, 30, "test"), book.alphabet)) == {"Z" * 30}, "the last tenth is for tests"
    with pytest.raises(common.UserError, match="a window 200"):
        book.sample(2, 200, "test")


@pytest.mark.parametrize("content, said", [
    (None, "no such text"), (b"\xff\xfe" * 900, "not a UTF-8"), (b"short", "5 characters, at least 1000"),
    (b"", "0 characters"), (b"a" * 2000, "1 different characters"),
    ("".join(map(chr, range(1000, 2500))).encode(), "1500 different")])
def test_bad_texts_end_in_one_line(content, said, tmp_path):
    path = tmp_path / "my.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(common.UserError, match=said) as error:
        grammar.read(str(path))
    assert "\n" not in str(error.value) and "my.txt" in str(error.value)


def test_bad_settings_are_refused():
    for letters, choices in ((1, 1), (4, 5), (30, 2), (4, 0)):
        with pytest.raises(ValueError, match="letters"):
            grammar.Markov(letters, choices)
