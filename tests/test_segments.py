"""Scenes to be segmented: masks and images agree, class counts, the measures."""
import pytest
import torch

from toy_data.segments import COLOURS, Drawn, Scenes, count, iou


def test_scenes_have_the_promised_shape_and_depend_on_the_stream_alone():
    torch.manual_seed(0)
    scenes = Scenes(size=24)
    images, masks, small = scenes.sample(50)
    assert images.shape == (50, 3, 24, 24) and images.abs().max() <= 1
    assert masks.shape == small.shape == (50, 24, 24) and masks.dtype == torch.long and small.dtype == torch.bool
    assert masks.min() == 0 and masks.max() == scenes.classes - 1 == 4
    torch.manual_seed(0)
    again = scenes.sample(50)
    assert all(torch.equal(a, b) for a, b in zip((images, masks, small), again))


def test_every_class_is_there_and_small_objects_are_small():
    torch.manual_seed(0)
    _, masks, small = Scenes(objects=1, small=0.5).sample(2000)
    area, tiny = (masks > 0).sum((1, 2)), small.flatten(1).any(1)
    assert area.min() >= 1 and 0.4 < tiny.float().mean() < 0.6
    assert area[tiny].float().mean() < 14 and area[~tiny].float().mean() > 20
    share = torch.bincount(masks.flatten(1).amax(1), minlength=5) / 2000
    assert share[0] == 0 and (share[1:] > 0.2).all()
    assert not small[masks == 0].any()


def test_forms():
    """Centre, middle of an edge and corner of the unit square, for disc, square, cross, ring."""
    scenes = Scenes()
    x, y = torch.tensor([[[0.0, 0.8, 0.8]]]), torch.tensor([[[0.0, 0.0, 0.8]]])
    found = [scenes.form(torch.full((1, 1, 1), k), x, y)[0, 0].tolist() for k in (1, 2, 3, 4)]
    assert found == [[True, True, False], [True, True, True], [True, True, False], [False, True, True]]


def test_colour_tells_the_class_as_often_as_it_should():
    torch.manual_seed(0)
    tones = 2 * torch.tensor(COLOURS) - 0.6
    for cue, low, high in ((1.0, 0.9, 1.0), (0.0, 0.15, 0.35)):
        images, masks, _ = Scenes(objects=1, small=0.0, cue=cue, noise=0.0).sample(500)
        inside = (masks > 0).float()
        mean = (images * inside[:, None]).sum((2, 3)) / inside.sum((1, 2))[:, None]
        guess = torch.cdist(mean, tones.clamp(-1, 1)).argmin(1) + 1
        assert low <= (guess == masks.flatten(1).amax(1)).float().mean() <= high


def test_background_alone_has_no_class():
    torch.manual_seed(0)
    images, masks, _ = Scenes(objects=0).sample(10)
    assert (masks == 0).all() and images.std() > 0.1


def test_confusion_and_iou():
    truth = torch.tensor([[0, 0, 1, 1], [2, 2, 2, 0]])
    guess = torch.tensor([[0, 1, 1, 1], [2, 0, 2, 0]])
    matrix = count(guess, truth, 4)
    assert matrix.tolist() == [[2, 1, 0, 0], [0, 2, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]]
    assert iou(matrix)[:3].tolist() == pytest.approx([2 / 4, 2 / 3, 2 / 3]) and iou(matrix)[3].isnan()
    assert count(guess, truth, 4, truth > 0).sum() == 5
    assert torch.equal(count(guess, truth, 4, truth > 0)[1:], matrix[1:])


def test_drawn_shapes_carry_their_labels():
    images, masks, small = Drawn("test").sample(40)
    assert images.shape == (40, 3, 16, 16) and not small.any()
    assert all(len(m.unique()) == 2 for m in masks) and masks.max() <= 8
    assert images.amax(1)[masks > 0].min() > images.amax(1)[masks == 0].median()
    torch.manual_seed(0)
    assert Drawn("train").sample(5)[0].shape == (5, 3, 16, 16)
