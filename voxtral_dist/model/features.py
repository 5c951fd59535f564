"""Log-mel features of a batch, on the model's device and within 1e-4 of `WhisperFeatureExtractor`'s.

Source of the formula: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision" (arXiv 2212.04356),
and the reference implementation in transformers: power spectrum, Slaney mel filters, log10, a floor at 8 below the
clip's maximum, then (x + 4) / 4. As in `VoxtralProcessor`, a clip of several windows is transformed whole and then cut
into windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperFeatureExtractor

from voxtral_dist.errors import UserError
from voxtral_dist.model.native import feature_extractor_of_native, native_folder

_MIN_POWER = 1e-10
_DYNAMIC_RANGE_LOG10 = 8.0
_INT16_SCALE = 32768.0
# The spectrum of more audio than this does not fit into the caches of a CPU, and takes twice the time.
_CPU_SAMPLES_AT_ONCE = 480_000
# On other devices memory is the limit.
_DEVICE_SAMPLES_AT_ONCE = 64 * 480_000
# Measured: the waveform, two complex spectra and their magnitude.
_SPECTRUM_BYTES_PER_SAMPLE = 32


class LogMel:
    """Computes features as a checkpoint's `preprocessor_config.json` describes them, on the model's device.

    Example:
        >>> import torch
        >>> from voxtral_dist import LogMel
        >>> log_mel = LogMel.from_pretrained("models/tiny", torch.device("cpu"))
        >>> windows = torch.zeros((3, 20_480), dtype=torch.int16)  # windows of 1.28 s: two of one clip, one of another
        >>> log_mel(windows, windows_per_clip=[2, 1]).shape
        torch.Size([3, 128, 128])
    """

    def __init__(self, extractor: WhisperFeatureExtractor, device: torch.device) -> None:
        self.num_mel_bins = int(extractor.feature_size)
        self._hop_samples = int(extractor.hop_length)
        self._fft_samples = int(extractor.n_fft)
        self.device = device
        self._window = torch.hann_window(self._fft_samples, device=device)
        filters = torch.from_numpy(np.asarray(extractor.mel_filters)).to(device, torch.float32)
        self._filters = filters.T.contiguous()

    @classmethod
    def from_pretrained(cls, path: str, device: torch.device) -> LogMel:
        """Read the description of a Voxtral folder or hub name.

        Raises:
            UserError: there is no usable `preprocessor_config.json`; in the native layout, `tekken.json`.
        """
        native = native_folder(path)
        try:
            if native is not None:
                return cls(feature_extractor_of_native(native), device)
            return cls(WhisperFeatureExtractor.from_pretrained(path), device)
        except (OSError, ValueError, KeyError) as error:
            file = "preprocessor_config.json" if native is None else "tekken.json"
            raise UserError(f"`model.path`: {path!r} has no usable {file}: {error}") from error

    def __call__(self, pcm: Tensor, windows_per_clip: Sequence[int]) -> Tensor:
        """Features of a batch of clips.

        Args:
            pcm: int16 `(C, S)` on the device: the C windows of all clips in order, with S samples each.
            windows_per_clip: windows of each clip, C in all.

        Returns:
            Float32 `(C, M, F)`: M mel bins and F frames of each window (3,000 for 30 s). Autocast is disabled, which
            would multiply filters and spectrum in bfloat16.
        """
        with torch.autocast(pcm.device.type, enabled=False):
            return self._features(pcm, windows_per_clip)

    def _features(self, pcm: Tensor, windows_per_clip: Sequence[int]) -> Tensor:
        num_windows, window_samples = pcm.shape
        features = torch.empty((num_windows, self.num_mel_bins, window_samples // self._hop_samples), device=pcm.device)
        # Slices and no index tensors, whose copy from the host would wait for the device.
        ends = accumulate(windows_per_clip)
        clips = [slice(end - count, end) for end, count in zip(ends, windows_per_clip, strict=True)]
        for count in sorted(set(windows_per_clip)):
            of_count = [clip for clip in clips if clip.stop - clip.start == count]
            at_once = self._clips_at_once(pcm, count)
            for some in (of_count[start : start + at_once] for start in range(0, len(of_count), at_once)):
                computed = self._clips_of_equal_length(torch.cat([pcm[clip] for clip in some]), count)
                for clip, own in zip(some, torch.split(computed, count), strict=True):
                    features[clip] = own
        return features

    def _clips_at_once(self, pcm: Tensor, count: int) -> int:
        return max(1, _samples_at_once(pcm.device.type) // (count * pcm.shape[1]))

    def _clips_of_equal_length(self, pcm: Tensor, count: int) -> Tensor:
        """Features of clips of `count` windows each: `(N * count, S)` -> `(N * count, M, F)`."""
        waveform = pcm.reshape(len(pcm) // count, -1).to(torch.float32) / _INT16_SCALE
        spectrum = torch.stft(waveform, self._fft_samples, self._hop_samples, window=self._window, return_complex=True)
        real, imaginary = torch.view_as_real(spectrum[..., :-1]).unbind(-1)
        # Not `abs`, whose roots take as long as the transform.
        power = real.square() + imaginary.square()
        log_mel = (self._filters @ power).clamp(min=_MIN_POWER).log10()
        loudest = log_mel.amax(dim=(1, 2), keepdim=True)
        scaled = (torch.maximum(log_mel, loudest - _DYNAMIC_RANGE_LOG10) + 4.0) / 4.0
        clips, bins, frames = scaled.shape
        cut = scaled.reshape(clips, bins, count, frames // count).transpose(1, 2)
        return cut.reshape(clips * count, bins, frames // count)


def spectrum_bytes(num_samples: int, longest_clip_samples: int, device_type: str) -> int:
    """Peak memory of `LogMel`, besides its input and output.

    Args:
        num_samples: samples of all clips of a batch.
        longest_clip_samples: samples of the longest one, which is transformed whole.
        device_type: torch's type of the device, which limits how many clips are transformed at a time.
    """
    at_once = min(num_samples, max(longest_clip_samples, _samples_at_once(device_type)))
    return _SPECTRUM_BYTES_PER_SAMPLE * at_once


def _samples_at_once(device_type: str) -> int:
    return _CPU_SAMPLES_AT_ONCE if device_type == "cpu" else _DEVICE_SAMPLES_AT_ONCE


def mask_features(features: Tensor, feature_masks: Tensor) -> Tensor:
    """Set masked features to 0, as Whisper in transformers does; without masks the same tensor is returned.

    Args:
        features: `(C, M, F)`: C windows, M mel bins, F frames.
        feature_masks: int64 `(N, 4)` on the same device: window, axis (0 frequency, 1 time), start, exclusive end.
    """
    if len(feature_masks) == 0:
        return features
    windows, bins, frames = features.shape
    masked_bins = _covered(feature_masks, 0, windows, bins)
    masked_frames = _covered(feature_masks, 1, windows, frames)
    return features.masked_fill(masked_bins[:, :, None] | masked_frames[:, None, :], 0.0)


def _covered(masks: Tensor, axis: int, num_windows: int, length: int) -> Tensor:
    """Whether each position of an axis lies in a mask of its window: bool `(C, length)`."""
    window, axis_of_mask, start, end = masks.unbind(dim=1)
    position = torch.arange(length, device=masks.device)
    inside = (position >= start[:, None]) & (position < end[:, None]) & (axis_of_mask == axis)[:, None]
    counts = torch.zeros((num_windows, length), dtype=torch.int32, device=masks.device)
    return counts.index_add_(0, window, inside.to(torch.int32)) > 0
