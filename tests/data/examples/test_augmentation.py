"""Augmentation is a function of (seed, epoch, utterance id), adds no window, and is checked at the start."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from pydantic import ValidationError

from voxtral_dist.config import AugmentationStep, SpecAugmentConfig, TrainDataConfig
from voxtral_dist.data.examples.augmentation import Augmentation
from voxtral_dist.data.examples.feature_masks import TIME_AXIS, draw_feature_masks
from voxtral_dist.data.examples.transforms import LengthAwareTimeStretch, build_transform
from voxtral_dist.data.loader import build_train_loader
from voxtral_dist.data.stored.audio import AudioError
from voxtral_dist.errors import UserError

from corpora import tone

RATE = 16_000
WINDOW = 2 * RATE
PIPELINE = """
- {name: Gain, arguments: {min_gain_db: -6, max_gain_db: 6, p: 0.8}}
- {name: LengthAwareTimeStretch, arguments: {min_rate: 0.8, max_rate: 1.2, p: 0.8}}
- {name: AddBackgroundNoise, arguments: {sounds_path: [NOISES], min_snr_db: 5, max_snr_db: 25, p: 0.8}}
- {name: ApplyImpulseResponse, arguments: {ir_path: ROOMS, p: 0.5}}
"""


def clip(num_samples: int = RATE, seed: int = 0) -> np.ndarray:
    return tone(num_samples / RATE, RATE, seed).astype(np.float32) / 32768


def chain(*steps: AugmentationStep) -> Augmentation:
    return Augmentation(steps, RATE)


def always(name: str, **arguments: object) -> AugmentationStep:
    return AugmentationStep(name=name, arguments={"p": 1.0} | arguments)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `noises`, in sub-folders and several formats and rates, and `rooms`."""
    folder = tmp_path_factory.mktemp("sounds")
    for number, name in enumerate(("noises/b/0.wav", "noises/a/1.flac", "noises/c/2.mp3", "noises/3.ogg")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, clip(2 * RATE, seed=number), (8000, RATE)[number % 2])
    (folder / "rooms").mkdir()
    decay = np.exp(-np.arange(2000) / 300)
    for number in range(3):
        response = np.random.default_rng(number).normal(0, 1, 2000) * decay
        soundfile.write(folder / "rooms" / f"{number}.wav", response / np.abs(response).max(), RATE)
    return folder


@pytest.fixture(scope="module")
def pipeline(sounds: Path) -> Augmentation:
    text = PIPELINE.replace("NOISES", str(sounds / "noises")).replace("ROOMS", str(sounds / "rooms"))
    return chain(*(AugmentationStep.model_validate(step) for step in yaml.safe_load(text)))


def test_a_key_gives_the_same_waveform_whatever_was_drawn_before(pipeline):
    keys = [(0, epoch_index, utterance_id) for epoch_index in range(2) for utterance_id in range(8)]
    in_order = {key: pipeline(clip(seed=key[2]), RATE, key, WINDOW) for key in keys}
    for key in random.Random(0).sample(keys, len(keys)):
        np.testing.assert_array_equal(pipeline(clip(seed=key[2]), RATE, key, WINDOW), in_order[key])


def test_epochs_seeds_and_utterances_draw_differently(pipeline):
    keys = [(0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1), (0, 0, 2**40)]
    heard = [pipeline(clip(), RATE, key, WINDOW).tobytes() for key in keys]
    assert len(set(heard)) == len(keys)


def test_an_augmented_clip_fits_its_windows_and_is_float32(pipeline):
    for utterance_id, num_samples in enumerate(np.random.default_rng(0).integers(800, WINDOW + 1, 30)):
        augmented = pipeline(clip(num_samples), RATE, (0, 0, utterance_id), WINDOW)
        assert (augmented.dtype, augmented.ndim) == (np.float32, 1)
        assert 0 < len(augmented) <= WINDOW
        assert np.isfinite(augmented).all()


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_transforms_are_applied_with_their_probability(probability):
    flip = chain(AugmentationStep(name="PolarityInversion", arguments={"p": probability}))
    num_flipped = sum(np.array_equal(flip(clip(), RATE, (0, 0, number), WINDOW), -clip()) for number in range(400))
    assert num_flipped == pytest.approx(400 * probability, abs=4 * np.sqrt(400 * probability * (1 - probability)))


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        (
            always("AdjustDuration", duration_seconds=2.5),
            r"is 2\.50 s long .* hold 2\.00 s: use LengthAwareTimeStretch",
        ),
        (always("TimeStretch", min_rate=0.5, max_rate=0.5, leave_length_unchanged=False), r"is 3\.00 s long"),
    ],
)
def test_a_clip_that_outgrows_its_windows_is_refused(step, sentence):
    with pytest.raises(AudioError, match=sentence):
        chain(step)(clip(3 * RATE // 2), RATE, (0, 0, 0), WINDOW)


def test_a_clip_that_a_transform_leaves_nothing_of_is_refused():
    with pytest.raises(AudioError, match="is empty after TimeStretch: use milder arguments"):
        chain(always("TimeStretch", min_rate=3, max_rate=3, leave_length_unchanged=False))(
            clip(1), RATE, (0, 0, 0), WINDOW
        )


@pytest.mark.parametrize("trouble", [np.nan, np.inf])
def test_a_clip_that_is_not_finite_is_refused(trouble):
    with pytest.raises(AudioError, match="not finite after Gain"):
        chain(always("Gain"))(np.full(RATE, trouble, dtype=np.float32), RATE, (0, 0, 0), WINDOW)


def test_a_transform_that_fails_on_one_clip_names_itself(tmp_path):
    soundfile.write(tmp_path / "noise.wav", clip(), RATE)
    add_noise = chain(always("AddBackgroundNoise", sounds_path=str(tmp_path)))
    (tmp_path / "noise.wav").unlink()
    with pytest.raises(AudioError, match="cannot be transformed by AddBackgroundNoise"):
        add_noise(clip(), RATE, (0, 0, 0), WINDOW)


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("Gian", {}, r"no transform `Gian`: did you mean `Gain`\?"),
        ("LengthAwareTimestretch", {}, r"did you mean `LengthAwareTimeStretch`\?"),
        ("Compose", {}, "no transform `Compose`"),
        ("Lambda", {}, "no transform `Lambda`"),
        ("Gain", {"max_gain_dB": 6}, r"`Gain` has no argument `max_gain_dB`: did you mean `max_gain_db`\?"),
        ("TimeMask", {"loud": 1}, "`TimeMask` has no argument `loud`"),
        ("Gain", {"max_gain_db": "loud"}, "`max_gain_db` of `Gain`: .* but is 'loud' instead"),
        ("Gain", {"max_gain_db": [1, 2]}, r"`max_gain_db` of `Gain`: .* but is \[1, 2\] instead"),
        ("Gain", {"max_gain_db": True}, "`max_gain_db` of `Gain` must be a number, but is True"),
        ("AddGaussianNoise", {"max_amplitude": "loud"}, "`max_amplitude` of `AddGaussianNoise`"),
        ("BitCrush", {"min_bit_depth": 5.5}, "`min_bit_depth` of `BitCrush`: .* integer"),
        ("TimeStretch", {"method": "magic"}, "`method` of `TimeStretch`: .* but is 'magic' instead"),
        ("Gain", {"p": 1.5}, "`Gain` does not accept these arguments: `0 <= p <= 1` must hold"),
        (
            "Gain",
            {"min_gain_db": 6, "max_gain_db": -6},
            "must not be greater than its `max_gain_db`, but they are 6.0 and -6.0",
        ),
        ("PeakingFilter", {"min_q": 10, "max_q": 2}, "`min_q` of `PeakingFilter` must not be greater than its `max_q`"),
        ("LengthAwareTimeStretch", {"min_rate": 0.4}, "min_rate must be >= 0.5"),
        ("LengthAwareTimeStretch", {"max_rate": 11}, "max_rate must be <= 10"),
        ("LengthAwareTimeStretch", {"max_duration_seconds": 0}, "max_duration_seconds must be > 0"),
        ("LengthAwareTimeStretch", {"max_duration_seconds": "long"}, "`max_duration_seconds` .* but is 'long' instead"),
        ("AdjustDuration", {}, "`AdjustDuration` does not accept these arguments: .* must hold"),
        (
            "Resample",
            {"min_sample_rate": 0, "max_sample_rate": 0},
            "cannot be transformed by Resample: .* over 0",
        ),
        ("AdjustDuration", {"duration_seconds": 1e-6}, "a trial clip of noise is empty after AdjustDuration"),
        ("TimeStretch", {"min_rate": 0.2, "max_rate": 0.3}, "differs each time it is transformed by TimeStretch"),
        ("AddBackgroundNoise", {}, "`AddBackgroundNoise` does not accept these arguments: .* 'sounds_path'"),
    ],
)
def test_a_mistake_in_the_configuration_is_refused_at_the_start(name, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        chain(AugmentationStep(name=name, arguments=arguments))


def test_a_number_that_yaml_reads_as_text_is_a_number():
    assert build_transform(always("AddGaussianNoise", min_amplitude="1e-4")).min_amplitude == 1e-4


def test_an_argument_may_not_be_a_mapping():
    with pytest.raises(ValidationError):
        AugmentationStep.model_validate({"name": "Gain", "arguments": {"p": {"q": 1}}})


NOISE_ARGUMENTS = [
    ("AddBackgroundNoise", "sounds_path"),
    ("AddShortNoises", "sounds_path"),
    ("ApplyImpulseResponse", "ir_path"),
]


@pytest.mark.parametrize(("name", "argument"), NOISE_ARGUMENTS)
@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("nowhere", "nowhere is neither"),
        ("empty", "empty contains no audio files"),
        ("broken", "hiss.wav cannot be read"),
        ("cut", "hiss.flac cannot be read|hiss.flac is shorter than its header"),
        ("silent", "hiss.wav contains no audio"),
        ("text/a.txt", "a.txt is neither"),
    ],
)
def test_folders_without_usable_sounds_are_refused(name, argument, place, sentence, tmp_path):
    for folder in ("empty", "broken", "cut", "silent", "text"):
        (tmp_path / folder).mkdir()
    (tmp_path / "text/a.txt").write_text("not audio")
    (tmp_path / "broken/hiss.wav").write_bytes(b"RIFF, it says")
    soundfile.write(tmp_path / "silent/hiss.wav", np.zeros(0), RATE)
    soundfile.write(tmp_path / "cut/hiss.flac", clip(10 * RATE), RATE)
    os.truncate(tmp_path / "cut/hiss.flac", (tmp_path / "cut/hiss.flac").stat().st_size // 2)
    for value in (str(tmp_path / place), [str(tmp_path / place)]):
        with pytest.raises(UserError, match=rf"`{argument}` of `{name}`.*({sentence})"):
            chain(always(name, **{argument: value}))


def test_of_a_large_folder_evenly_spaced_files_are_opened(tmp_path, monkeypatch):
    for number in range(4):
        soundfile.write(tmp_path / f"{number}.wav", clip(400), RATE)
    (tmp_path / "1.wav").write_bytes(b"not audio")
    step = always("AddBackgroundNoise", sounds_path=str(tmp_path))
    with pytest.raises(UserError, match=r"1\.wav cannot be read"):
        build_transform(step)
    monkeypatch.setattr("voxtral_dist.data.examples.transforms._MAX_CHECKED_FILES", 2)
    assert len(build_transform(step).sound_file_paths) == 4


@pytest.mark.parametrize(("name", "argument"), NOISE_ARGUMENTS)
def test_the_order_of_files_does_not_depend_on_the_file_system(name, argument, tmp_path):
    names = [f"{folder}/{number}.wav" for folder in ("b", "a", "c/d", "B") for number in (2, 10)]
    heard = []
    for machine, order in enumerate((names, names[::-1], sorted(names))):
        for sound in order:
            (tmp_path / str(machine) / sound).parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(tmp_path / str(machine) / sound, clip(4000, seed=names.index(sound)), RATE)
        augmentation = chain(always(name, **{argument: str(tmp_path / str(machine))}))
        heard.append([augmentation(clip(), RATE, (0, 0, number), WINDOW) for number in range(10)])
    np.testing.assert_array_equal(heard[0], heard[1])
    np.testing.assert_array_equal(heard[0], heard[2])


@pytest.mark.parametrize("rates", [(0.5, 1.0), (0.8, 1.25), (0.9, 0.95), (1.1, 2.0)])
def test_a_stretched_clip_never_outgrows_its_windows(rates):
    generator = np.random.default_rng(0)
    stretch = chain(always("LengthAwareTimeStretch", min_rate=rates[0], max_rate=rates[1]))
    for number in range(40):
        max_samples = int(generator.integers(1, 5)) * 4000
        num_samples = int(generator.integers(max_samples // 3, max_samples + 1))
        waveform = clip(num_samples, seed=number)
        stretched = stretch(waveform, RATE, (0, 0, number), max_samples)
        assert len(stretched) <= max_samples
        if num_samples / max_samples > rates[1]:
            np.testing.assert_array_equal(stretched, waveform)
        else:
            slowest = max(rates[0], num_samples / max_samples)
            assert num_samples / rates[1] - 1 <= len(stretched) <= num_samples / slowest + 1


def test_a_clip_that_fills_its_windows_is_only_played_faster():
    lengths = {}
    for min_rate, max_rate in ((0.8, 1.25), (0.8, 0.9)):
        stretch = chain(always("LengthAwareTimeStretch", min_rate=min_rate, max_rate=max_rate))
        lengths[max_rate] = [len(stretch(clip(WINDOW), RATE, (0, 0, number), WINDOW)) for number in range(20)]
    assert lengths[0.9] == [WINDOW] * 20
    assert max(lengths[1.25]) <= WINDOW
    assert len(set(lengths[1.25])) == 20


@pytest.mark.parametrize("limit_seconds", [0.4, 0.9, 1.2, 5.0])
def test_a_stretched_clip_stays_within_the_duration_that_the_configuration_sets(limit_seconds):
    """A clip that is longer already is only played faster, and stays as it is where no rate is fast enough."""
    stretch = chain(always("LengthAwareTimeStretch", min_rate=0.8, max_rate=1.25, max_duration_seconds=limit_seconds))
    lengths = [len(stretch(clip(), RATE, (0, 0, number), WINDOW)) for number in range(20)]
    longest = min(limit_seconds * RATE, RATE / 0.8 + 1)
    if limit_seconds < 1 / 1.25:
        assert lengths == [RATE] * 20
    else:
        assert RATE / 1.25 - 1 <= min(lengths) < max(lengths) <= longest
        assert len(set(lengths)) == 20
    # The windows hold where they are shorter than the limit.
    assert max(len(stretch(clip(), RATE, (0, 0, number), RATE)) for number in range(20)) <= RATE


@pytest.mark.parametrize("rate", [0.5, 0.77, 1.0, 1.3, 2.0])
@pytest.mark.parametrize("frequency", [220.0, 1000.0, 3000.0])
def test_stretching_keeps_the_pitch_and_divides_the_length(rate, frequency):
    sine = 0.3 * np.sin(2 * np.pi * frequency * np.arange(2 * RATE) / RATE).astype(np.float32)
    transform = LengthAwareTimeStretch(rate, rate, p=1.0)
    stretched = transform(sine, RATE)
    assert abs(len(stretched) - len(sine) / rate) <= 1
    spectrum = np.abs(np.fft.rfft(stretched * np.hanning(len(stretched))))
    assert spectrum.argmax() * RATE / len(stretched) == pytest.approx(frequency, rel=0.02)


def draw(config: SpecAugmentConfig, key: tuple[int, ...], num_frames: int, window: int = 100) -> np.ndarray:
    return draw_feature_masks(config, key, num_frames, window, 32, frames_per_second=100.0)


def cells(masks: np.ndarray, num_windows: int, window: int = 100) -> np.ndarray:
    """Which frames of the whole clip are masked, `(num_windows * window,)`."""
    masked = np.zeros((num_windows, window), dtype=bool)
    for row, axis, start, end in masks:
        if axis == TIME_AXIS:
            masked[row, start:end] = True
    return masked.ravel()


CONFIG = SpecAugmentConfig(
    num_time_masks=3,
    max_time_mask_seconds=0.6,
    max_time_mask_fraction=0.2,
    num_frequency_masks=2,
    max_frequency_mask_bins=8,
)


@pytest.mark.parametrize("num_frames", [1, 4, 37, 100, 101, 250, 300, 700])
def test_masks_lie_inside_the_audio_and_within_their_limits(num_frames):
    num_windows = -(-num_frames // 100)
    widest = 0
    for utterance_id in range(200):
        masks = draw(CONFIG, (0, 0, utterance_id), num_frames)
        assert (masks.dtype, masks.shape[1]) == (np.int64, 4)
        window, axis, start, end = masks.T
        assert ((window >= 0) & (window < num_windows) & (start >= 0) & (start < end)).all()
        assert (end <= np.where(axis == TIME_AXIS, 100, 32)).all()
        masked = cells(masks, num_windows)
        assert not masked[num_frames:].any()
        assert masked.sum() <= 3 * min(0.2 * num_frames, 60)
        widest = max(widest, masked.sum())
        bands = masks[axis != TIME_AXIS]
        assert ((bands[:, 3] - bands[:, 2]) <= 8).all()
        # A band is the same in all windows of the clip.
        assert len({tuple(map(tuple, bands[bands[:, 0] == row, 2:])) for row in range(num_windows)}) == 1
    assert widest > 0 or 0.2 * num_frames < 1


def test_a_clip_of_several_windows_is_masked_as_one():
    one_mask = CONFIG.model_copy(
        update={"num_time_masks": 1, "max_time_mask_fraction": 1.0, "max_time_mask_seconds": 9.0}
    )
    crossed = 0
    for utterance_id in range(200):
        cut, whole = (draw(one_mask, (0, 0, utterance_id), 350, window) for window in (100, 400))
        np.testing.assert_array_equal(cells(cut, 4), cells(whole, 1, 400))
        edges = np.flatnonzero(np.diff(cells(cut, 4).astype(int), prepend=0, append=0))
        assert len(edges) in (0, 2)
        crossed += len(set(cut[cut[:, 1] == TIME_AXIS, 0])) > 1
    assert crossed > 50


def test_masks_depend_on_their_key_alone():
    expected = {utterance_id: draw(CONFIG, (3, 1, utterance_id), 250).tolist() for utterance_id in range(20)}
    random.seed(99)
    np.random.seed(99)
    assert {
        utterance_id: draw(CONFIG, (3, 1, utterance_id), 250).tolist() for utterance_id in reversed(range(20))
    } == expected
    assert [draw(CONFIG, (3, 2, utterance_id), 250).tolist() for utterance_id in range(20)] != list(expected.values())
    assert len({str(masks) for masks in expected.values()}) == 20


def test_widths_are_uniform_up_to_their_limit():
    one_mask = CONFIG.model_copy(update={"num_time_masks": 1, "num_frequency_masks": 0})
    widths = [int(cells(draw(one_mask, (0, 0, utterance_id), 100), 1).sum()) for utterance_id in range(4200)]
    counts = np.bincount(widths, minlength=21)
    assert len(counts) == 21
    assert (np.abs(counts - 200) < 5 * np.sqrt(200)).all()


def test_no_masks_are_an_empty_table():
    nothing = SpecAugmentConfig(num_time_masks=0, num_frequency_masks=0)
    assert draw(nothing, (0, 0, 0), 250).shape == (0, 4)


def test_a_band_wider_than_the_features_is_refused(shard_folder, prompts):
    wide = SpecAugmentConfig(max_frequency_mask_bins=prompts.num_mel_bins + 1)
    config = TrainDataConfig.model_validate({"shards": [str(shard_folder)], "max_examples": 4, "spec_augment": wide})
    with pytest.raises(UserError, match=rf"max_frequency_mask_bins` must be at most {prompts.num_mel_bins}"):
        build_train_loader(config, prompts, seed=0, num_steps=1, rank=0, world_size=1)
