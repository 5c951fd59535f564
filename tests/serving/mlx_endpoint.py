"""OpenAI's route for transcriptions over mlx-voxtral: `python mlx_endpoint.py MODEL`, in an environment of its own.

Prints the port that it listens on. mlx-voxtral makes prompt and features itself.
"""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import mlx.core as mx
import soundfile
from mlx_voxtral import VoxtralForConditionalGeneration, VoxtralProcessor
from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

END_OF_TEXT = 2


def transcriber(folder: str) -> Any:
    """The application that answers by the model in a folder."""
    model = VoxtralForConditionalGeneration.from_pretrained(folder, dtype=mx.float32)
    processor = VoxtralProcessor.from_pretrained(folder)

    @Request.application
    def answer(request: Request) -> Response:
        if request.method == "GET":
            return Response(json.dumps({"data": [{"id": "mlx"}]}), mimetype="application/json")
        waveform, _ = soundfile.read(io.BytesIO(request.files["file"].read()), dtype="float32")
        inputs = processor.apply_transcrition_request(audio=waveform, language=request.form.get("language"))
        generated = model.generate(
            input_ids=inputs.input_ids,
            input_features=inputs.input_features,
            max_new_tokens=int(request.form["max_completion_tokens"]),
            temperature=float(request.form["temperature"]),
            repetition_penalty=1.0,
            stop_tokens=[END_OF_TEXT],
        )
        completion = generated[0, inputs.input_ids.shape[1] :].tolist()
        text = processor.tokenizer.decode(completion, skip_special_tokens=True)
        return Response(json.dumps({"text": text}), mimetype="application/json")

    return answer


if __name__ == "__main__":
    server = make_server("127.0.0.1", 0, transcriber(sys.argv[1]))
    print(server.server_port, flush=True)
    server.serve_forever()
