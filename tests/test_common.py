"""common.py, networks.py, toy_data/points.py against closed forms, scipy and numerical derivatives."""
import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import pytest
import torch
import torch.nn as nn
from scipy import linalg, stats

import common
from toy_data.points import MIXTURES, NAMES, Points

# ------------------------------------------------------------------------------------------- metrics

def test_frechet_is_scipys():
    torch.manual_seed(0)
    x, y = torch.randn(500, 6) @ torch.randn(6, 6), torch.randn(400, 6) @ torch.randn(6, 6) + 1
    c1, c2 = np.cov(x.double().numpy().T), np.cov(y.double().numpy().T)
    expected = (x.double().mean(0) - y.double().mean(0)).square().sum().item() + np.trace(
        c1 + c2 - 2 * linalg.sqrtm(c1 @ c2).real)
    assert common.frechet(x, y) == pytest.approx(expected, rel=1e-6)
    assert common.frechet(x, x) == pytest.approx(0, abs=1e-8)


def test_sliced_wasserstein_in_one_dimension_and_for_a_shift():
    torch.manual_seed(0)
    x, y = torch.randn(1000, 1), torch.randn(1000, 1) * 2 + 1
    exact = math.sqrt(np.mean((np.sort(x[:, 0]) - np.sort(y[:, 0])) ** 2))
    assert common.sliced_wasserstein(x, y) == pytest.approx(exact, rel=1e-5)
    # a shift by s in D dimensions costs |s|^2 / D on average over directions
    z, shift = torch.randn(300, 2), torch.tensor([3.0, 4.0])
    assert common.sliced_wasserstein(z, z + shift, 4096) == pytest.approx(math.sqrt(25 / 2), rel=0.02)
    assert common.sliced_wasserstein(z, z[torch.randperm(300)]) == 0
    assert common.sliced_wasserstein(x, x.repeat(3, 1)) < 0.03      # unequal sizes, same law


def test_mmd_is_zero_in_mean_for_one_law_and_positive_for_two():
    torch.manual_seed(0)
    same = np.mean([common.mmd(torch.randn(200, 2), torch.randn(200, 2)) for _ in range(20)])
    assert abs(same) < 0.005
    assert common.mmd(torch.randn(200, 2), torch.randn(200, 2) + 1) > 0.1


def test_mode_stats_on_hand_made_samples():
    means, weights = torch.tensor([[0.0, 0], [10, 0], [0, 10]]), torch.tensor([0.5, 0.25, 0.25])
    x = torch.cat([means[0].repeat(5, 1), means[1].repeat(4, 1), torch.tensor([[10.0, 3.5]])])
    found = common.mode_stats(x, means, weights, std=1.0)
    assert found["coverage"] == pytest.approx(2 / 3)
    assert found["mass_tv"] == pytest.approx(0.25)          # shares 0.5, 0.5, 0 against 0.5, 0.25, 0.25
    assert found["off_support"] == pytest.approx(0.1)


def test_classification_metrics_by_hand():
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
    found = common.classification(p.log(), torch.tensor([0, 1, 1, 1]))
    assert found["acc"] == 0.75
    assert found["nll"] == pytest.approx(-np.log([0.9, 0.2, 0.7, 0.6]).mean(), rel=1e-5)
    assert found["ece"] == pytest.approx((0.1 + 0.8 + 0.3 + 0.4) / 4, rel=1e-5)     # four bins of one example


def test_ece_of_a_calibrated_predictor_is_near_zero():
    torch.manual_seed(0)
    logits = torch.randn(40000, 5)
    labels = torch.multinomial(logits.softmax(1), 1)[:, 0]
    assert common.classification(logits, labels)["ece"] < 0.01 < common.classification(4 * logits, labels)["ece"]


def test_precision_and_recall_tell_blur_from_collapse():
    torch.manual_seed(0)
    real = torch.randn(500, 2)
    assert min(common.precision_recall(real, torch.randn(500, 2))) > 0.85
    precision, recall = common.precision_recall(real, 0.1 * torch.randn(500, 2))
    assert precision > 0.95 and recall < 0.4
    precision, recall = common.precision_recall(real, 8 * torch.randn(500, 2))
    assert precision < 0.3 and recall > 0.7


# ------------------------------------------------------------------------------------------- exact flows

@pytest.mark.parametrize("name", MIXTURES)
def test_exact_score_is_the_gradient_of_the_log_density(name):
    data = Points(name)
    means, weights = data.means.double(), data.weights.double()
    x, sigma = torch.randn(20, 2, dtype=torch.float64, requires_grad=True), torch.linspace(0.1, 5, 20).double()
    variance = data.std**2 + sigma.square()
    logp = torch.logsumexp(weights.log() - (x[:, None] - means).square().sum(-1) / (2 * variance[:, None])
                           - variance.log()[:, None], 1)
    expected, = torch.autograd.grad(logp.sum(), x)
    assert torch.allclose(data.score(x.detach(), sigma), expected, atol=1e-9)


def test_exact_velocity_is_the_conditional_mean():
    """Against a regression of noise - x on x_t by brute force in a narrow window."""
    torch.manual_seed(0)
    data, t = Points("unequal_ring"), 0.6
    x, _ = data.sample(2000000)
    noise = torch.randn_like(x)
    x_t = (1 - t) * x + t * noise
    centre = torch.tensor([0.5, 0.3])
    near = (x_t - centre).norm(dim=1) < 0.06
    expected = (noise - x)[near].mean(0)
    found = data.velocity(x_t[near], torch.full((int(near.sum()),), t)).mean(0)
    assert torch.allclose(found, expected, atol=0.05)


def test_conditional_velocity_and_the_label_that_means_none():
    data = Points("eight_gaussians", conditional=True)
    x, t = torch.randn(9, 2), torch.full((9,), 0.5)
    none = data.velocity(x, t, torch.full((9,), 8))
    assert torch.allclose(none, data.velocity(x, t))
    y = torch.arange(9) % 8
    one = data.velocity(x, t, y)        # a single Gaussian: linear in x
    std, means = data.std, data.means[y]
    expected = (0.5 - 0.5 * std**2) / (0.25 * std**2 + 0.25) * (x - 0.5 * means) - means
    assert torch.allclose(one, expected, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_points_have_zero_mean_unit_variance(name):
    torch.manual_seed(0)
    x, y = Points(name, conditional=True).sample(100000)
    assert x.mean(0).abs().max() < 0.03 and x.square().mean().sqrt() == pytest.approx(1, abs=0.01)
    assert y.min() == 0 and y.max() == Points(name, conditional=True).classes - 1
    assert Points(name).sample(5)[1] is None


# ------------------------------------------------------------------------------------------- samplers

@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2)])
def test_order_of_accuracy_on_the_exact_teacher(method, order):
    torch.manual_seed(0)
    data = Points("eight_gaussians")
    noise = torch.randn(200, 2, dtype=torch.float64)
    exact = common.sample_flow(data.velocity, noise, 2048, method="heun")
    error = [(common.sample_flow(data.velocity, noise, n, method=method) - exact).norm(dim=1).median() for n in (64, 128)]
    assert math.log2(error[0] / error[1]) == pytest.approx(order, abs=0.35)


def test_solver_calls_path_and_direction():
    calls = []

    def velocity(x, t):
        calls.append(t[0].item())
        return torch.ones_like(x) * t[:, None]
    path = common.solve(velocity, torch.zeros(3, 1), torch.tensor([0.0, 0.5, 1.0]), "heun", path=True)
    assert path.shape == (3, 3, 1) and len(calls) == 4
    assert torch.allclose(path[:, 0, 0], torch.tensor([0, 0.125, 0.5]))     # t^2 / 2, exact for Heun
    with pytest.raises(ValueError, match="'euler' or 'heun'"):
        common.solve(velocity, torch.zeros(3, 1), torch.tensor([0.0, 1.0]), "rk4")


def test_denoiser_view_matches_the_exact_denoiser():
    data = Points("grid25")
    x, sigma = torch.randn(30, 2).double() * 3, torch.logspace(-2, 1.5, 30).double()
    assert torch.allclose(common.Denoiser(data.velocity)(x, sigma), data.denoise(x, sigma), atol=1e-9)
    assert torch.equal(common.Denoiser(data.velocity)(x, torch.zeros(30).double()), x)
    score = common.score_from_denoised(x, sigma, data.denoise(x, sigma))
    assert torch.allclose(score, data.score(x, sigma))


def test_karras_levels():
    sigmas = common.karras_sigmas(18)
    assert sigmas[0] == pytest.approx(80, rel=1e-5) and sigmas[-1] == pytest.approx(0.002, rel=1e-4)
    assert (sigmas.diff() < 0).all()
    even = sigmas.double().pow(1 / 7).diff()
    assert torch.allclose(even, even[:1].expand_as(even), rtol=1e-3)


def test_guidance_is_linear_in_its_scale():
    data = Points("eight_gaussians", conditional=True)
    x, t, y = torch.randn(6, 2), torch.rand(6), torch.arange(6)
    cond, uncond = data.velocity(x, t, y), data.velocity(x, t)
    for scale, expected in ((1, cond), (0, uncond), (3, uncond + 3 * (cond - uncond))):
        assert torch.allclose(common.guided(data.velocity, scale, 8)(x, t, y), expected, atol=1e-5)


# ------------------------------------------------------------------------------------------- networks

def test_time_features_tell_positive_from_negative_times():
    features = common.MLP(2).condition.time
    t = torch.linspace(-1, 1, 41)
    f = features(t)
    apart = torch.cdist(f, f) + torch.eye(41) * 9
    assert apart.min() > 0.1


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 12, 12), (3, 16, 16), (1, 7, 9)])
def test_unet_shapes_classes_and_gradients(shape):
    net = common.UNet(shape, width=16, classes=3, times=2)
    nn.init.normal_(net.down[0].conv2.weight, std=0.1)
    x, t = torch.randn(4, *shape), torch.rand(4)
    y = torch.tensor([0, 1, 2, 3])
    out = net(x, t, y, t / 2)
    assert out.shape == x.shape and net.hidden(x, t, y).shape == (4, 16, *shape[1:])
    assert torch.allclose(net(x, t)[3], net(x, t, y, t)[3], atol=1e-5)     # label 3 = none; s defaults to t
    assert not torch.allclose(net(x, t, y, t)[0], net(x, t, y, t / 2)[0])
    out.square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_networks_call_by_kind_of_data():
    cfg = common.Config(device="cpu")
    assert isinstance(common.make_network(cfg, Points("moons"), 16, 2), common.MLP)
    data = common.load_data(common.Config(data="shapes", device="cpu"))
    net = common.make_network(cfg, data, 16, 1, out=5)
    x, y = data.sample(3)
    assert net(x, torch.rand(3), y).shape == (3, 5, 8, 8) and net.condition.classes == 8


def test_resnet_logits_and_features():
    net = common.ResNet(3, 10, 8, (1, 1, 1))
    x = torch.randn(4, 3, 16, 16)
    assert net(x).shape == (4, 10) and net.features(x).shape == (4, net.width == 32 and 32)


def test_transformer_is_causal_or_not_and_its_cache_changes_nothing():
    torch.manual_seed(0)
    tokens = torch.randint(11, (3, 9))
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 11
    net = common.Transformer(11, width=32, length=12)
    out = net(tokens)
    assert out.shape == (3, 9, 11) and torch.allclose(out[:, :6], net(changed)[:, :6], atol=1e-6)
    assert not torch.allclose(out[:, 6:], net(changed)[:, 6:], atol=1e-3)
    cache = net.new_cache()
    parts = torch.cat([net(part, cache=cache) for part in tokens.split([4, 1, 4], 1)], 1)
    assert torch.allclose(parts, out, atol=1e-5)
    both = common.Transformer(11, width=32, length=12, causal=False)
    assert not torch.allclose(both(tokens)[:, 0], both(changed)[:, 0], atol=1e-4)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[:, 6] = False
    for model, place in ((both, 0), (net, 8)):      # a padded position is not seen, from either side
        assert torch.allclose(model(tokens, mask=mask)[:, place], model(changed, mask=mask)[:, place], atol=1e-6)
    assert torch.allclose(net(embeds=net.token(tokens)), out)
    with pytest.raises(ValueError, match="13 positions"):
        net(torch.zeros(1, 13, dtype=torch.long))


# ------------------------------------------------------------------------------------------- training helpers

def test_ema_and_update_and_frozen():
    net = nn.Linear(2, 1)
    average = copy.deepcopy(net)
    before = [p.clone() for p in net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    common.update(optimizer, 1e6 * net(torch.ones(5, 2)).square().mean(), clip=1.0)
    moved = torch.cat([(a - b).flatten() for a, b in zip(net.parameters(), before)]).norm().item()
    assert moved == pytest.approx(0.1, rel=1e-3)        # lr times the clipped norm
    common.ema_update(average, net, 0.75)
    for a, b, p in zip(average.parameters(), before, net.parameters()):
        assert torch.allclose(a, 0.75 * b + 0.25 * p)
    copied = common.frozen(net)
    assert not copied.training and not any(p.requires_grad for p in copied.parameters())
    assert all(p.requires_grad for p in net.parameters())


def test_loop_has_its_own_random_stream():
    def numbers(draws_inside):
        torch.manual_seed(3)
        inside = []
        for _ in common.loop(common.Config(seed=1), "x", 2):
            inside += [torch.rand(1).item() for _ in range(draws_inside)]
        return inside, torch.rand(1).item()
    assert numbers(1)[1] == numbers(5)[1]               # outside, the stream does not see the training
    assert numbers(3)[0] == numbers(3)[0]


def test_compile_reaches_the_copies_that_train():
    """A deep copy of a compiled network is not compiled; without --compile nothing is."""
    for compile in (True, False):
        cfg = common.Config(compile=compile)
        teacher = cfg.place(nn.Linear(2, 2))
        student = copy.deepcopy(teacher)
        common.loop(cfg, "arm", 1, teacher=teacher, student=student, curve=torch.zeros(1))
        assert all((net._compiled_call_impl is not None) == compile for net in (teacher, student))


def test_loop_names_the_step_and_the_term_of_a_non_finite_loss():
    progress = common.loop(common.Config(), "student", 100)
    with pytest.raises(common.NonFiniteLoss, match="student: loss term 'gan' is nan at step 13"):
        for step in progress:
            progress.losses(flow=torch.tensor(1.0), gan=torch.tensor(math.nan if step >= 13 else 0.5))


def test_loop_resumes_bit_for_bit(tmp_path):
    def train(stop, resume):
        torch.manual_seed(0)
        net, curve = nn.Linear(2, 2), torch.zeros(30)
        optimizer = torch.optim.Adam(net.parameters(), 0.1)
        cfg = common.Config(resume=resume, checkpoint_every=0.0)
        cfg.context.state = tmp_path
        for step in common.loop(cfg, "arm", 30, net=net, optimizer=optimizer, curve=curve):
            if step == stop:
                break
            loss = net(torch.randn(8, 2)).square().mean()
            common.update(optimizer, loss)
            curve[step] = loss.detach()
        return net.weight.clone(), curve
    whole = train(None, False)
    train(17, False)
    resumed = train(None, True)
    assert torch.equal(whole[0], resumed[0]) and torch.equal(whole[1], resumed[1])
    done = train(0, True)       # a finished loop is loaded and yields no step
    assert torch.equal(whole[0], done[0])


# ------------------------------------------------------------------------------------------- augmentation

def coded_images(n=600, h=7, w=9):
    """Images whose two channels hold each pixel's row and column, so that every output pixel says where it is from."""
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack([rows, columns]).expand(n, 2, h, w).to(torch.uint8).contiguous()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_augmentation_moves_whole_images_repeats_the_border_and_mirrors_half(shift, flip):
    x = coded_images()
    torch.manual_seed(0)
    y = common.shift_and_flip(x, shift, flip)
    assert y.shape == x.shape and y.dtype == x.dtype
    seen = set()
    for image in y.long():
        rows, columns = image[0, :, 0], image[1, 0]
        assert (image[0] == rows[:, None]).all() and (image[1] == columns).all()      # one move for the whole image
        mirrored = bool(columns[0] > columns[-1])
        columns = columns.flip(0) if mirrored else columns
        dy, dx = int(rows[3]) - 3, int(columns[4]) - 4        # of the centre, which shows no border
        assert torch.equal(rows, (torch.arange(7) + dy).clamp(0, 6))
        assert torch.equal(columns, (torch.arange(9) + dx).clamp(0, 8))
        seen.add((dy, dx, mirrored))
    moves = range(-shift, shift + 1)
    assert seen == {(dy, dx, m) for dy in moves for dx in moves for m in ((False, True) if flip else (False,))}
    if flip:
        share = (y[:, 1, 0, 0] > y[:, 1, 0, -1]).float().mean()
        assert abs(share - 0.5) < 0.08      # four standard deviations


def test_augmentation_of_one_image_keeps_its_place_in_the_batch_and_its_type():
    labels = torch.arange(200)
    x = (labels / 100 - 1).view(-1, 1, 1, 1).expand(200, 3, 6, 5)        # an image of one colour shows its label
    kept = x.clone()
    y = common.shift_and_flip(x, 2, flip=True)
    assert torch.equal(y, x) and torch.equal(x, kept) and y.dtype == torch.float32


def test_augmentation_follows_the_global_stream_and_draws_only_what_is_asked_for():
    x = torch.rand(40, 3, 8, 8)
    torch.manual_seed(5)
    a, state = common.shift_and_flip(x, 2, flip=True), torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(common.shift_and_flip(x, 2, flip=True), a)
    assert not torch.equal(common.shift_and_flip(x, 2, flip=True), a)
    torch.set_rng_state(state)
    assert common.shift_and_flip(x, 0) is x and torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------- command line

@dataclass
class Options(common.Config):
    PRESETS: ClassVar[dict] = {"images": dict(width=8), "shapes": dict(lr=0.5), "smoke": dict(width=2)}
    width: Annotated[int, "width"] = 64
    lr: Annotated[float, "learning rate, 100 % of it"] = 1e-3
    kind: Annotated[Literal["a", "b"], "kind"] = "a"
    flag: Annotated[bool, "flag"] = True
    scales: Annotated[tuple[float, ...], "scales", common.between(0, 10)] = (1.0, 2.0)
    shift: Annotated[float, "shift", common.between(-1, 1)] = 0.0


def test_command_line_types_presets_and_explicit_flags():
    cfg = common.parse(Options, ["--scales", "3,4.5", "--no-flag", "--shift", "-0.5", "--kind", "b"])
    assert cfg.scales == (3.0, 4.5) and cfg.flag is False and cfg.shift == -0.5 and cfg.kind == "b" and cfg.width == 64
    cfg = common.parse(Options, ["--data", "shapes"])
    assert (cfg.width, cfg.lr) == (8, 0.5)
    cfg = common.parse(Options, ["--data", "shapes", "--smoke", "--lr", "0.1"])
    assert (cfg.width, cfg.lr, cfg.steps) == (2, 0.1, 3)
    assert common.parse(Options, ["--smoke", "--steps", "7"]).steps == 7


@pytest.mark.parametrize("arguments, said", [
    (["--width", "0"], "--width: 0 is not in"), (["--lr", "-1"], "--lr: -1 is not in"), (["--lr", "nan"], "--lr: nan"),
    (["--lr", "inf"], "--lr: inf"), (["--width", "1.5"], "'1.5' is not an integer"), (["--kind", "c"], "invalid choice"),
    (["--scales", "1,x"], "'x' is not a number"), (["--shift", "2"], "2 is not in"), (["--wdith", "3"], "did you mean --width?"),
    (["--seeds", "0"], "--seeds"), (["--seed", "-1"], "--seed")])
def test_bad_options_end_in_one_clear_line(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        common.parse(Options, arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and error.count("\n") == 1


def test_help_lists_every_option_with_meaning_and_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        common.parse(Options, ["--help"], "what it is")
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and "what it is" in text and "learning rate, 100 % of it (default: 0.001)" in " ".join(text.split())
    assert "images: width 8" in text and "smoke: steps 3" in text
    for field in dataclasses.fields(Options):
        assert "--" + field.name.replace("_", "-") in text


# ------------------------------------------------------------------------------------------- every public name is described

def test_every_public_name_has_a_docstring():
    import ledger
    import networks
    import pictures
    for module in (common, networks, ledger, pictures):
        for name, thing in vars(module).items():
            if not name.startswith("_") and getattr(thing, "__module__", "") == module.__name__ and callable(thing):
                assert thing.__doc__, f"{module.__name__}.{name} has no docstring"


def test_student_t_quantile_is_scipys():
    import ledger
    assert ledger.quantile(0.95, 4) == pytest.approx(stats.t.ppf(0.95, 4))


def test_a_second_flow_teacher_has_steps_and_a_loop_of_its_own(tmp_path, monkeypatch):
    """One with as many steps as the first is the first, from the cache."""
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))

    @dataclass
    class Config(common.Config):
        teacher_steps: Annotated[int, "steps"] = 3
    cfg = Config(data="eight_gaussians", smoke=True)
    data = common.load_data(cfg)
    first, brief, same = (common.flow_teacher(cfg, data, 8, 1, **options) for options in (
        {}, dict(name="brief", steps=2), dict(name="same", steps=3)))
    assert cfg.context.steps == {"teacher": 3, "brief": 2}
    weights = [torch.cat([p.flatten() for p in net.parameters()]) for net in (first, brief, same)]
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[1])
