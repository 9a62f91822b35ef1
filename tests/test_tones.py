"""Spoken strings: grammar, durations, alignment, what a text fixes and what a reading adds."""
import math

import pytest
import torch

from toy_data import tones


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_strings_keep_to_the_grammar_and_fit():
    string, durations = tones.strings(4000, (5, 8), 32)
    there = string != tones.PAD
    assert ((durations > 0) == there).all() and durations.sum(1).max() <= 32
    assert (there.int().diff(dim=1) <= 0).all()                         # padding at the end alone
    assert set(there.sum(1).tolist()) == {5, 6, 7, 8}
    for a, b in string[:300].unfold(1, 2, 1).flatten(0, 1).tolist():
        if tones.PAD not in (a, b):
            assert tones.TRANSITIONS[a, b] > 0
            assert tones.PHONEMES[a] in tones.VOWELS or tones.PHONEMES[b] in tones.VOWELS
    vowel = string < len(tones.VOWELS)
    for part, (low, high) in ((vowel, tones.LENGTHS["vowel"]), (there & ~vowel, tones.LENGTHS["other"])):
        assert durations[part].min() == low and durations[part].max() == high
    assert tones.strings(500, (10, 12), 30)[1].sum(1).max() <= 30       # too long for 30 frames: cut


def test_pairs_come_with_the_probabilities_of_the_grammar():
    string, _ = tones.strings(20000, (6, 6), 48)
    pairs = string.unfold(1, 2, 1).flatten(0, 1)
    count = torch.zeros(tones.PAD, tones.PAD).index_put_(tuple(pairs.T), torch.ones(len(pairs)), accumulate=True)
    torch.testing.assert_close(tones.TRANSITIONS.sum(1), torch.ones(tones.PAD))
    assert (count / count.sum(1, keepdim=True) - tones.TRANSITIONS).abs().max() < 0.04
    assert (tones.TRANSITIONS.max(1)[0] > 3 * tones.TRANSITIONS.clamp_min(1e-9).median(1)[0]).all()     # favourites


def test_alignment_repeats_each_phoneme_for_its_duration():
    string, durations = torch.tensor([[3, 7, 0], [5, tones.PAD, tones.PAD]]), torch.tensor([[3, 2, 4], [4, 0, 0]])
    assert tones.expand(string, durations, 10).tolist() == [[3, 3, 3, 7, 7, 0, 0, 0, 0, 16], [5] * 4 + [16] * 6]
    assert tones.alignment(durations, 10).tolist() == [[0, 0, 0, 1, 1, 2, 2, 2, 2, 3], [0] * 4 + [3] * 6]
    assert tones.text(string) == ["oni", "y"]


def test_clips_are_padded_with_zeros_where_the_mask_is_false():
    clips = tones.sample(300, 40, (6, 10))
    assert clips.mel.shape == (300, tones.BINS, 40) and clips.mask.shape == (300, 40)
    assert torch.equal(clips.mask.sum(1), clips.durations.sum(1))
    assert not clips.mel.transpose(1, 2)[~clips.mask].any()
    inside = clips.mel.transpose(1, 2)[clips.mask]
    assert -1.7 < inside.min() and inside.max() < 3.5 and 0.4 < inside.std() < 0.7


def one_text(text, durations, n, **options):
    string = torch.tensor([[tones.PHONEMES.index(p) for p in text]]).expand(n, -1)
    return tones.read(string, torch.tensor([durations]).expand(n, -1), sum(durations), **options)


def test_a_reading_has_harmonics_at_its_pitch():
    """The period of the ripple, found by a scan over periods, is the pitch of the clip."""
    clips = one_text("a", [6], 400)
    envelope = one_text("a", [6], 2000, ripple=0.0).mel.mean(0)
    ripple = ((clips.mel - envelope) * (envelope > -0.6))[:, :, 3]
    periods = torch.linspace(*tones.PITCH, 60)
    match = ripple @ torch.cos(2 * math.pi * (torch.arange(tones.BINS)[:, None] + 1) / periods)
    error = (periods[match.argmax(1)] / clips.pitch[:, 3] - 1).abs()
    assert error.median() < 0.03 and (error < 0.15).float().mean() > 0.9
    assert clips.pitch[:, 3].std() > 0.3


def test_readings_of_one_text_differ_and_their_mean_is_smooth():
    clips = one_text("samo", [3, 6, 3, 5], 600)
    mean, detail = clips.mel.mean(0), lambda x: x.diff(n=2, dim=-2).square().mean()
    assert clips.mel.std(0).mean() > 0.1 and detail(mean) < 0.4 * detail(clips.mel)
    quiet = one_text("samo", [3, 6, 3, 5], 600, ripple=0.0)
    assert quiet.mel[:, :, 4].std(0).mean() < clips.mel[:, :, 4].std(0).mean()


def test_phonemes_can_be_told_apart_and_glide():
    parts = tones.tracks(torch.tensor([[0, 2]]), torch.tensor([[6, 6]]), 12)[0]      # "ia"
    centre = parts[:, 3]
    assert centre[0] == 14 and centre[-1] == 11 and (centre.diff() <= 0).all() and centre.unique().numel() == 6
    middle = torch.stack([one_text(p, [6], 200).mel[:, :, 5].mean(0) for p in tones.PHONEMES])
    assert torch.cdist(middle, middle).fill_diagonal_(9).min() > 0.5


def test_stops_are_closed_until_their_last_frame():
    height = tones.tracks(torch.tensor([[13]]), torch.tensor([[6]]), 6)[0, :, 1]
    full = tones.FORMANTS["p"][1]
    assert torch.allclose(height[:2], torch.tensor(0.1 * full)) and height[5] > 5 * height[0]


def test_the_text_alone_decides_the_tracks_and_nothing_after_the_end_leaks():
    string, durations = tones.strings(50, (5, 8), 32)
    found = tones.tracks(string, durations, 32)
    assert torch.equal(found, tones.tracks(string, durations, 32))
    changed = string.clone()
    changed[:, 4:] = tones.PAD
    shorter = tones.tracks(changed, durations * (changed != tones.PAD), 32)
    for a, b, end in zip(found, shorter, durations[:, :4].sum(1)):
        assert torch.equal(a[:end - 2], b[:end - 2])


def test_speakers_share_out_the_range_of_pitch():
    clips = tones.sample(2000, speakers=4)
    assert set(clips.speaker.tolist()) == {0, 1, 2, 3}
    means = [clips.pitch[clips.speaker == i].mean().item() for i in range(4)]
    assert means == sorted(means) and means[3] - means[0] > 1
    assert all(clips.pitch[clips.speaker == i].mean(1).std() < 0.3 for i in range(4))
    mine = tones.read(clips.string, clips.durations, 32, clips.speaker, speakers=4)
    assert torch.equal(mine.speaker, clips.speaker)
    pairs = torch.stack([mine.pitch.mean(1), clips.pitch.mean(1)])
    assert torch.corrcoef(pairs)[0, 1] > 0.7
    assert tones.sample(100).speaker.max() == 0


def test_same_stream_same_clips():
    first, second = (torch.manual_seed(6) and tones.sample(4) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_gallery_puts_low_bins_at_the_bottom_and_blanks_the_padding():
    mel, mask = torch.full((4, tones.BINS, 5), 0.5), torch.ones(4, 5, dtype=torch.bool)
    mel[0, 0], mask[1, 3:] = 1.0, False
    sheet = tones.gallery(mel, mask)
    assert sheet.shape == (2 * 22, 2 * 7) and sheet[20, 1] == 1.0 and sheet[1, 1] == 0.5 and sheet[0, 0] == 1.5
    assert sheet[1, 8:11].tolist() == [0.5] * 3 and sheet[1, 11:13].tolist() == [-1.0] * 2


def test_pick_keeps_the_parts_of_a_clip_together():
    clips = tones.sample(50)
    some = tones.pick(clips, 200)
    assert some.mel.shape == (200, tones.BINS, 32)
    assert torch.equal(some.mask.sum(1), some.durations.sum(1))
    assert torch.equal(some.phoneme, tones.expand(some.string, some.durations, 32))
    same = (some.mel[0] == clips.mel).flatten(1).all(1).nonzero()[0, 0]
    assert torch.equal(some.pitch[0], clips.pitch[same]) and torch.equal(some.alignment[0], clips.alignment[same])
    assert len(some.mel.sum((1, 2)).unique()) > 40


def test_the_recogniser_learns_phonemes_and_pitch_and_ignores_the_padding():
    data, net = tones.sample(2000), tones.Recogniser(32)
    before = net.loss(data)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        sum(net.loss(tones.pick(data, 32)).values()).backward()
        optimizer.step()
    fresh = tones.sample(300)
    after = net.loss(fresh)
    assert after["phoneme"] < 0.7 * before["phoneme"] and after["pitch"] < 0.2 * before["pitch"]
    assert tones.accuracy(net, fresh.mel, fresh) > 0.3 > 2 * tones.accuracy(net, fresh.mel, tones.sample(300))
    changed = fresh._replace(pitch=torch.where(fresh.mask, fresh.pitch, 9.0))
    torch.testing.assert_close(net.loss(changed), after)


def test_detail_tells_sharp_harmonics_from_their_mean():
    clips = one_text("samo", [3, 6, 3, 5], 300)
    sharp, mean = (tones.detail(x, clips.mask) for x in (clips.mel, clips.mel.mean(0).expand_as(clips.mel)))
    assert mean < 0.4 * sharp
    assert tones.detail(torch.arange(20.0).view(1, 20, 1).expand_as(clips.mel), clips.mask) == 0     # a straight line
    assert sharp == pytest.approx(tones.detail(torch.cat([clips.mel, 9 * clips.mel]), torch.cat([clips.mask, ~clips.mask])))
