"""Pictures: what is drawn where."""
import io

import numpy as np
import pytest
import torch
from PIL import Image

import pictures


def opened(panels, **options):
    return np.asarray(Image.open(io.BytesIO(pictures.draw(panels, **options))).convert("RGB")).astype(int)


def test_points_land_where_they_belong():
    x = torch.tensor([[1.0, 1.0]]).repeat(50, 1)
    image = opened([("upper right", torch.cat([x, -x]) * torch.tensor([1.0, 1.0])), ("only upper right", x)])
    panel = image[pictures.GAP + pictures.BAR:, 2 * pictures.GAP + pictures.SIZE:][:pictures.SIZE, :pictures.SIZE]
    dark = np.argwhere(panel.sum(2) < 500)
    assert (dark[:, 0] < pictures.SIZE / 2).all() and (dark[:, 1] > pictures.SIZE / 2).all()    # y grows upwards


def test_images_keep_their_colours_and_order():
    red, blue = torch.tensor([1.0, -1, -1]), torch.tensor([-1.0, -1, 1])
    images = torch.stack([red, blue, blue, red])[:, :, None, None].expand(4, 3, 4, 4)
    image = opened([("", images)])[pictures.GAP + pictures.BAR:, pictures.GAP:]
    assert image[10, 10].tolist() == [255, 0, 0] and image[10, 290].tolist() == [0, 0, 255]
    assert image[290, 290].tolist() == [255, 0, 0]


def test_bars_are_as_long_as_their_values():
    """From a common zero: 1 and 2 to the right, -1 to the left, in this order from top to bottom."""
    panel = opened([("", {"bars": {"a": 1.0, "b": 2.0, "c": -1.0}})])[pictures.GAP + pictures.BAR:, pictures.GAP:]
    widths, starts = [], []
    for i in range(3):
        row = panel[int(8 + (i + 0.5) * (pictures.SIZE - 34) / 3) + 20, :pictures.SIZE]     # below the writing
        coloured = np.flatnonzero(row.max(1) - row.min(1) > 20)
        widths.append(len(coloured))
        starts.append(coloured[0])
    assert widths[1] == pytest.approx(2 * widths[0], abs=4) and widths[2] == pytest.approx(widths[0], abs=4)
    assert starts[0] == starts[1] > starts[2]


@pytest.mark.parametrize("content", [
    torch.randn(20, 5), torch.randn(20, 1), torch.full((3, 2), float("nan")), (torch.randn(9, 2), torch.arange(9)),
    torch.randn(3, 1, 5, 7), {"heat": torch.rand(4, 9)}, {"heat": torch.zeros(3, 3)},
    {"curves": {"a": ([1, 2], [1.0, 1.0]), "b": ([1], [float("nan")])}, "x": "steps", "y": "loss", "logy": True},
    {"curves": {"a": (torch.arange(100), torch.rand(100))}, "logx": False}, {"bars": {}}, {"bars": {"a": 0.0}},
    {"bars": {"a": torch.tensor(-1.0), "b": float("nan"), "a name that is much too long for the panel" * 3: 5}, "x": "accuracy"}])
def test_every_kind_of_content_can_be_drawn(content):
    assert opened([("panel with a rather long label that does not fit its width", content)] * 5, columns=3, title="t").std() > 0


def test_unknown_content_is_refused():
    with pytest.raises(ValueError, match="cannot draw"):
        pictures.draw([("", torch.randn(2, 3, 4))])
