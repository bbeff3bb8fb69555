"""Films that browsers play, strips with whole pixels, curves."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT
from worldmodels.evaluation.pictures import difference, montage, plot, strip, write_gif, write_mp4


@pytest.fixture
def film():
    """(2, 6, 3, 16, 16): a white column that moves right over brown, two films of it."""
    frames = torch.tensor([144, 72, 17], dtype=torch.uint8)[:, None, None].repeat(2, 6, 1, 16, 16)
    for t in range(6):
        frames[:, t, :, :, 2 * t] = 236
    return frames


def test_difference_does_not_wrap():
    a, b = torch.tensor([3, 250], dtype=torch.uint8), torch.tensor([250, 3], dtype=torch.uint8)
    assert difference(a, b).tolist() == [247, 247]


def test_montage_holds_every_film_in_whole_pixels(film):
    images = montage([film, film.flip(1)], scale=3)
    assert images.shape[:2] == (6, 3) and images.dtype == torch.uint8
    assert images.shape[2] % 2 == images.shape[3] % 2 == 0  # video needs it
    first = images[0, :, 4 : 4 + 48, 4 : 4 + 48]
    assert torch.equal(first, film[0, 0].repeat_interleave(3, 1).repeat_interleave(3, 2))
    below = images[0, :, 4 + 52 : 4 + 52 + 48, 4 : 4 + 48]
    assert torch.equal(below, film[0, -1].repeat_interleave(3, 1).repeat_interleave(3, 2))


def test_mp4_is_what_browsers_play(film, tmp_path):
    av = pytest.importorskip("av")
    images = montage([film], scale=4)
    with av.open(str(write_mp4(tmp_path / "a.mp4", images))) as container:
        stream = container.streams.video[0]
        assert (stream.codec.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 15)
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(decoded) == 6
    error = np.abs(np.stack(decoded).astype(int) - images.permute(0, 2, 3, 1).numpy())
    assert error.mean() < 6


def test_gif_has_the_frames(film, tmp_path):
    images = montage([film], scale=2)
    with Image.open(write_gif(tmp_path / "a.gif", images)) as gif:
        assert gif.n_frames == 6 and gif.info["duration"] == 70 and gif.info["loop"] == 0
        gif.seek(3)
        error = np.abs(np.asarray(gif.convert("RGB")).astype(int) - images[3].permute(1, 2, 0).numpy())
    assert error.max() < 8


def test_strip_shows_the_steps_that_exist(film, tmp_path):
    path = strip(tmp_path / "s.png", {"real": film[0], "imagined": film[1]}, (0, 1, 2, 4, 8, 50), scale=2)
    image = np.asarray(Image.open(path))
    assert image.shape == (22 + 4 + 2 * 36, 84 + 4 + 4 * 36, 3)
    assert (image == 236).all(-1).sum() >= 8 * 32 * 2  # the white column of 8 frames


def test_plot_writes_svg_and_png(tmp_path):
    panels = {"a": {"model": ((1, 2, 4), (3.0, 2.0, None)), "copy": ((1, 2, 4), (1.0, 1.0, 1.0))}}
    svg = plot(tmp_path / "a.svg", panels, "steps", "dB", log="x").read_text()
    assert "<svg" in svg and "http://www.w3.org/2000/svg" in svg
    assert Image.open(plot(tmp_path / "a.png", panels, "steps", "dB")).size[0] > 300
    assert "FillBetween" not in svg
    panels["a"]["model"] = ((1, 2, 4), (3.0, 2.0, None), ((2.0, 4.0), (1.0, 3.0), (None, None)))
    assert "FillBetween" in plot(tmp_path / "b.svg", panels, "steps", "dB", log="x").read_text()


def test_curves_of_one_name_have_one_colour_in_all_panels(tmp_path):
    """And where there are many of them, one legend beside the panels names each once."""
    points = (0, 90, 180), (1.0, 2.0, 3.0)
    panels = {"a": {"p": points, "z": points}, "b": {name: points for name in "pqrsz"}}
    svg = plot(tmp_path / "a.svg", panels, "degrees", "return").read_text()
    lines = [part[: part.index("</g>")] for part in svg.split('id="line2d_')[1:] if "stroke-width: 1.4" in part]
    colours = [re.findall("stroke: (#[0-9a-f]{6})", line)[0] for line in lines]
    assert len(set(colours)) == 4 and colours[0] == colours[4]  # z, then q, r, s, z
    assert svg.count("<!-- z -->") == 1 and svg.count("legend_") == 1


def test_the_script_shows_reality_above_two_dreams_of_it(tmp_path):
    """Of rollout 1: levels tell the row and the step of what is in each place."""
    obs = np.broadcast_to(np.arange(51, dtype=np.uint8)[:, None, None, None], (2, 51, 3, 8, 8)).copy()
    obs[0] = 255
    np.savez(tmp_path / "logged.npz", real_obs=obs, obs=obs + 60)
    np.savez(tmp_path / "random.npz", obs=obs + 120)
    command = [sys.executable, ROOT / "scripts/dream_picture.py", tmp_path, "--rollout", "1", "--out"]
    subprocess.run([*command, tmp_path / "a.png"], check=True, env={"PYTHONPATH": str(ROOT)}, capture_output=True)
    image = np.asarray(Image.open(tmp_path / "a.png"))
    cell = 16 + 4
    centres = image[22 + 4 + 8 :: cell, 84 + 4 + 8 :: cell, 0]
    assert centres[:3, :7].tolist() == [[level + t for t in (1, 5, 10, 20, 30, 40, 50)] for level in (0, 60, 120)]
