"""eSpeak NG as a function: text in, samples out. It needs no installed program, only the wheel `espeakng-loader`.

The library keeps global state (voice, noise, filters), so there is one of it per process, and what it says depends a
little on what it said before: only processes that speak the same texts in the same order give the same samples.
"""

import ctypes
import functools
from dataclasses import dataclass

import espeakng_loader
import numpy as np
from numpy.typing import NDArray

OUTPUT_SYNCHRONOUS = 2  # audio goes to the callback alone, and `espeak_Synth` returns when all of it is made
DONT_EXIT = 0x8000  # report a failure instead of ending the process
CHARACTERS_UTF8 = 1
PARAMETER_RATE, PARAMETER_PITCH = 1, 3

SynthCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True)
class Manner:
    """Manner of speaking a text. A voice is a language and a variant, like `en+f4` or `de+Andy`."""

    voice: str
    words_per_minute: int = 175
    pitch: int = 50  # 0 to 100


class SpeechEngine:
    """eSpeak NG, initialised once; see `speech_engine`."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data_dir = str(espeakng_loader.get_data_path()).encode()
        self.sampling_rate = int(self._library.espeak_Initialize(OUTPUT_SYNCHRONOUS, 0, data_dir, DONT_EXIT))
        if self.sampling_rate <= 0:
            raise RuntimeError(f"eSpeak NG could not start with its data in {data_dir.decode()}.")
        self._pieces: list[NDArray[np.int16]] = []
        self._callback = SynthCallback(self._keep)  # ctypes holds no reference: without this one C calls freed memory
        self._library.espeak_SetSynthCallback(self._callback)

    def say(self, text: str, manner: Manner) -> NDArray[np.int16]:
        """Samples of `text`, `(num_samples,)` at `sampling_rate`."""
        if self._library.espeak_SetVoiceByName(manner.voice.encode()) != 0:
            raise ValueError(f"`voice` must be one of eSpeak NG's, but is {manner.voice!r} instead.")
        self._library.espeak_SetParameter(PARAMETER_RATE, manner.words_per_minute, 0)
        self._library.espeak_SetParameter(PARAMETER_PITCH, manner.pitch, 0)
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(0))  # otherwise breathy voices differ from run to run
        self._pieces.clear()
        encoded = text.encode()
        self._library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, 0, 0, CHARACTERS_UTF8, None, None)
        return np.concatenate(self._pieces) if self._pieces else np.zeros(0, np.int16)

    def _keep(self, samples: "ctypes._Pointer[ctypes.c_short]", num_samples: int, _events: object) -> int:
        if samples and num_samples > 0:
            self._pieces.append(np.ctypeslib.as_array(samples, (num_samples,)).copy())
        return 0


@functools.cache
def speech_engine() -> SpeechEngine:
    """Return the engine of this process. Fork before the first call, never after it."""
    return SpeechEngine()
