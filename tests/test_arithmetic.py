"""The arithmetic problems: answers against Python's own arithmetic, split, verifiers, mixtures."""
import itertools

import pytest
import torch
from conftest import ROOT

from toy_data import arithmetic
from toy_data.arithmetic import Addition, Chain, Mixture, Parts, Sort, Sums, decode, encode

EOS, PAD, TOKENS, VOCABULARY = arithmetic.EOS, arithmetic.PAD, arithmetic.TOKENS, arithmetic.VOCABULARY

ALL = [*(Addition(d, cot) for d in (1, 2, 3) for cot in ("none", "forward", "short", "long")),
       *(Chain(3, cot=cot) for cot in ("none", "short", "long")), Chain(2, 7, "+-"), *(Sums(4, 10, o) for o in
       ("forward", "backward", "any")), Sums(5, 7), Parts(3), Parts(5, 3), Sort(4)]


def name(task):
    return f"{type(task).__name__}-{'-'.join(str(v) for v in vars(task).values() if not torch.is_tensor(v))}"


@pytest.fixture(params=ALL, ids=name)
def task(request):
    torch.manual_seed(0)
    return request.param


def test_vocabulary_has_no_double_and_digits_are_their_own_tokens():
    assert len(set(VOCABULARY)) == TOKENS
    assert encode("0123456789").tolist() == list(range(10))
    assert decode(encode(VOCABULARY)) == VOCABULARY and decode(torch.tensor([[1, TOKENS]])) == ["1#"]
    with pytest.raises(KeyError):
        encode("@")


def test_shapes_and_form(task):
    prompts, answers = task.sample(200)
    assert prompts.shape == (200, task.prompt_length) and answers.shape == (200, task.answer_length)
    assert prompts.dtype == answers.dtype == torch.int64
    for prompt, answer in zip(decode(prompts), decode(answers)):
        assert prompt[0] == task.letter and prompt[-1] == "=" and answer.count(".") == 1 and answer[-1] == "."
    assert (task.prompt(task.read(prompts)) == prompts).all()


def by_hand(task, prompt):
    """The answer to one prompt in plain Python; None where there are several."""
    if task.letter == "A":
        a, b = prompt[1:-1].split("+")
        total = f"{int(a) + int(b):0{task.digits + 1}d}"
        if task.cot in ("none", "forward"):
            return (total[::-1] if task.cot == "none" else total) + "."
        text, carry = "", 0
        for x, y in zip(a[::-1], b[::-1]):
            z = int(x) + int(y) + carry
            text += (f"{x}+{y}+{carry}=" if task.cot == "long" else "") + f"{z:02d};"
            carry = z // 10
        return f"{text}={total}."
    if task.letter == "C":
        value, text = int(prompt[1]), ""
        for operation, x in zip(prompt[2:-1:2], prompt[3:-1:2]):
            new = eval(f"{value} {operation} {x}") % task.modulus
            text += {"none": "", "short": f"{new}", "long": f"{value}{operation}{x}={new};"}[task.cot]
            value = new
        return text + {"none": f"{value}", "short": "", "long": f"={value}"}[task.cot] + "."
    digits = [int(c) for c in prompt[1:-1]]
    if task.letter == "S" and task.order != "any":
        digits = digits[::-1] if task.order == "backward" else digits
        return "".join(f"{x}{s % task.modulus}" for x, s in zip(digits, itertools.accumulate(digits))) + "."
    return "".join(map(str, sorted(digits))) + "." if task.letter == "O" else None


def test_answers_are_those_of_plain_python(task):
    prompts, answers = task.sample(100)
    for prompt, answer in zip(decode(prompts), decode(answers)):
        assert by_hand(task, prompt) in (None, answer)
    for solution in (answers, task.solve(prompts)):
        assert task.correct(prompts, solution).all() and task.valid(prompts, solution).all()


def test_examples():
    def solve(task, text):
        return decode(task.solve(encode(text)[None]))[0]
    assert solve(Addition(2), "A57+68=") == "15;12;=125."
    assert solve(Addition(2, "none"), "A57+68=") == "521." and solve(Addition(2, "forward"), "A57+68=") == "125."
    assert solve(Addition(2, "long"), "A57+68=") == "7+8+0=15;5+6+1=12;=125."
    assert solve(Chain(3), "C7+4*2-5=") == "127." and solve(Chain(2, cot="long"), "C7+4*2=") == "7+4=1;1*2=2;=2."
    assert solve(Sums(4), "S3142=") == "33144820." and solve(Sort(4), "O3142=") == "1234."
    assert Parts(3).valid(encode("P583=")[None], encode("237121.")[None]).all()


def test_one_wrong_token_is_found(task):
    prompts, answers = task.sample(50)
    for i in range(task.answer_length):
        broken = answers.clone()
        broken[:, i] = torch.where(broken[:, i] < 10, (broken[:, i] + 1) % 10, PAD)
        assert not task.valid(prompts, broken).any(), i
        final = task.answer_length - 1 - task.final_length <= i
        assert task.correct(prompts, broken).all() != final, i


def test_text_behind_eos_does_not_matter_and_a_missing_eos_does(task):
    prompts, answers = task.sample(50)
    longer = torch.cat([answers, torch.randint(TOKENS, (50, 4))], 1)
    assert task.valid(prompts, longer).all() and task.correct(prompts, longer).all()
    empty, endless = torch.full_like(answers, PAD), answers.masked_fill(answers == EOS, PAD)
    for short in (answers[:, :-1], answers[:, :1], empty, endless):
        assert not task.valid(prompts, short).any() and not task.correct(prompts, short).any()
    early = torch.cat([torch.full((50, 1), EOS), answers], 1)
    assert not task.correct(prompts, early).any() and not task.valid(prompts, early).any()


def test_split_is_disjoint_and_stable(task):
    def problems(split):
        prompts, _ = task.sample(3000, split)
        return {tuple(row) for row in task.key(task.read(prompts)).tolist()}
    train, test = problems("train"), problems("test")
    assert train and test and not train & test
    with pytest.raises(ValueError, match="'train' or 'test'"):
        task.sample(1, "valid")


def test_split_shares_and_commutation():
    torch.manual_seed(0)
    for task in (Addition(3), Chain(4), Sums(6), Parts(5)):
        share = arithmetic.in_test(task.key(task.draw(20000))).float().mean()
        assert 0.08 < share < 0.12
    task = Addition(2)
    swapped = torch.tensor([[1, 2, 3, 4], [3, 4, 1, 2]])
    assert (task.key(swapped)[0] == task.key(swapped)[1]).all()
    operands = task.draw(2000)
    assert (arithmetic.in_test(task.key(operands)) == arithmetic.in_test(task.key(operands.roll(2, 1)))).all()
    assert arithmetic.in_test(torch.tensor([[1, 2, 3], [9, 9, 9]])).dtype == torch.bool


def test_numbers_come_from_torchs_stream_and_verifiers_draw_none(task):
    torch.manual_seed(5)
    first = task.sample(30, slip=0.2)
    torch.manual_seed(5)
    again = task.sample(30, slip=0.2)
    assert all((a == b).all() for a, b in zip(first, again))
    before = torch.get_rng_state()
    task.correct(*first), task.valid(*first), task.solve(first[0])
    assert (torch.get_rng_state() == before).all()
    assert task.sample(0)[0].shape == (0, task.prompt_length)


def test_slips_happen_at_their_rate_and_later_steps_build_on_them():
    torch.manual_seed(0)
    task = Chain(4)
    prompts, answers = task.sample(4000, slip=0.25)
    values, operations = task.read(prompts)[:, :5], task.read(prompts)[:, 5:]
    before = torch.cat([values[:, :1], answers[:, :3]], 1)
    step = torch.where(operations == arithmetic.PLUS, before + values[:, 1:], before - values[:, 1:])
    step = torch.where(operations == arithmetic.TIMES, before * values[:, 1:], step) % 10
    assert abs((step != answers[:, :4]).float().mean() - 0.25) < 0.02
    assert (answers[:, :4] < 10).all()
    for other in (Addition(3), Sums(4), Sort(4)):
        prompts, answers = other.sample(500, slip=0.3)
        assert 0.1 < other.valid(prompts, answers).float().mean() < 0.5


def test_free_choices_are_free_and_all_of_them_valid():
    torch.manual_seed(0)
    for task, text, count in ((Sums(3, order="any"), "S123=", 6), (Parts(1, 3), "P2=", 6), (Parts(2, 2), "P31=", 8)):
        answers = task.answer(task.read(encode(text)[None]).expand(2000, -1))
        assert len(set(decode(answers))) == count
        assert task.valid(encode(text).expand(2000, -1), answers).all()
    sums = Sums(3)      # any order passes, whatever order is handed out
    assert sums.valid(encode("S123=")[None], encode("332516.")[None]).all()
    assert not sums.valid(encode("S123=")[None], encode("112213.")[None]).any(), "each term once"


def test_mixture_pads_and_judges_row_by_row():
    torch.manual_seed(0)
    mix = Mixture([Chain(1), Chain(3), Addition(2), Sort(4)], [1, 1, 1, 0.5])
    prompts, answers = mix.sample(400, "test")
    assert prompts.shape == (400, mix.prompt_length) and answers.shape == (400, mix.answer_length)
    kind = mix.kind(prompts)
    share = torch.bincount(kind, minlength=4) / 400
    assert (share[:3] - 2 / 7).abs().max() < 0.08 and abs(share[3] - 1 / 7) < 0.06
    assert mix.correct(prompts, answers).all() and mix.valid(prompts, answers).all()
    assert (mix.solve(prompts) == answers).all()
    broken = answers.clone()
    broken[::2, 0] = PAD
    assert (mix.valid(prompts, broken) == torch.arange(400).remainder(2).bool()).all()
    assert mix.kind(torch.full((1, mix.prompt_length), PAD)).tolist() == [-1]
    with pytest.raises(ValueError, match="same letter"):
        Mixture([Chain(2), Chain(2, cot="long")])


@pytest.mark.parametrize("wrong", [dict(modulus=11), dict(modulus=1), dict(operations="/"), dict(operations="")])
def test_impossible_settings(wrong):
    with pytest.raises(ValueError):
        Chain(2, **wrong)
    with pytest.raises(ValueError):
        Sums(2, modulus=11)


def test_module_imports_nothing_of_the_project():
    assert "import common" not in (ROOT / "toy_data" / "arithmetic.py").read_text()
