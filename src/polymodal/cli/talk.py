"""Ask a model aloud and hear its answer, sentence by sentence as it is made.

Speech is found (VAD), written down (--asr), answered by any model, and spoken (--tts). With a microphone, which needs
the extra `microphone`, one question follows the other until Ctrl-C, and whoever speaks interrupts the answer. Examples:
  polymodal talk --input question.wav --image cat.jpg --output answer.wav
  polymodal talk --model openai:gpt-4o --asr base
"""

import argparse
from dataclasses import fields
from typing import Any

from polymodal.cli import common
from polymodal.errors import ConfigError, MediaError
from polymodal.messages import Message, Part, Text, assistant, system

MICROPHONE = "microphone"
SILENCE = "no-speech"
"""The code of the error where nobody spoke."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    add = parser.add_argument
    add("--input", default=MICROPHONE, metavar="FILE", help="a sound or video with the question (the microphone)")
    add("--output", metavar="FILE", help="where to write the answer as WAV; it is played where this is left out")
    add("--prompt", help="text before the spoken question, such as what to do with it")
    add("--system", help="a system message")
    add("--instruction", metavar="TEXT", help='how to answer, told after the question ("Answer in a whole sentence.")')
    add_listening_arguments(parser)
    add("--no-asr", action="store_true", help="give the sound itself to the model, where it takes sounds")
    add("--tts", default="piper", metavar="NAME", help='"piper", an .onnx of Piper, a folder or hub id (%(default)s)')
    add("--no-barge-in", action="store_true", help="do not let the microphone interrupt the answer")
    common.add_media_arguments(parser)
    common.add_model_argument(parser)
    common.add_loading_arguments(parser, "auto")
    common.add_sampling_arguments(parser)


def add_listening_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--asr`, `--vad` and `--language`."""
    add = parser.add_argument
    add("--asr", default="tiny.en", metavar="NAME", help='"tiny.en", "base", a folder or a hub id (%(default)s)')
    add("--vad", default="silero", metavar="NAME", help='what finds the speech: "silero" (default) or "energy"')
    add("--language", metavar="CODE", help='the language, such as "en"; found out where it is left out')


def run(args: argparse.Namespace) -> int:
    """Open the engines, then listen and answer."""
    from polymodal.speech import load_asr, load_tts, load_vad

    common.check_files(args, "output")
    if args.output is not None:
        common.check_wav(args.output)
    params = common.sampling_params(args)
    parts: list[Part] = [*common.media(args), *([Text(args.prompt)] if args.prompt else [])]
    common.check_media(parts)
    live = args.input == MICROPHONE
    if live and args.output is not None:
        raise ConfigError("--output is for a question from a file; leave it out, or give --input question.wav")
    if live or args.output is None:
        from polymodal.speech.microphone import devices

        devices()
    engines: dict[str, Any] = {
        "vad": args.vad if args.no_asr and not live else load_vad(args.vad),
        "asr": None if args.no_asr else load_asr(args.asr),
        "tts": load_tts(args.tts),
        "language": args.language,
        "params": params,
    }
    if args.instruction is not None:
        engines["instruction"] = args.instruction
    model = common.open_model(args)
    history: list[Message] = [system(args.system)] if args.system else []
    if not live:
        _answer(args, model, args.input, parts, history, engines)
        return 0
    from polymodal.speech.microphone import Microphone

    microphone = Microphone(engines["vad"])
    while True:
        with microphone.open():
            common.note("speak now; Ctrl-C ends")
            question = microphone.question()
            heard = None if args.no_barge_in else microphone.interrupted
            try:
                said = _answer(args, model, question, parts, history, engines, heard)
                history, parts = history + said, [] if said else parts  # which stay in the conversation
            except MediaError as error:
                if error.code != SILENCE:
                    raise
                common.report(error)


def _answer(
    args: argparse.Namespace,
    model: Any,
    question: Any,
    parts: list[Part],
    history: list[Message],
    engines: dict[str, Any],
    heard: Any = None,
) -> list[Message]:
    """Answer one question, written into a file or played; the new messages of the conversation."""
    from polymodal.speech import talk, wav_bytes
    from polymodal.speech.microphone import play

    answer = talk(question, model, parts=parts, history=history, on_text=common.stream_text, stop=heard, **engines)
    if answer.transcript is not None:
        if not answer.transcript.text:
            what = f"{args.input}: no speech was found in it; speak louder, or give a sound with speech"
            raise MediaError(what, SILENCE)
        print(f"> {common.one_line(answer.transcript.text)}", flush=True)
    with answer:
        if args.output is not None:
            chunks = list(answer)
            print()
            if not chunks:
                raise MediaError("the model's answer has no words that can be spoken; ask something else")
            common.write_file(args.output, wav_bytes(chunks))
        else:
            play(answer, heard)
            print()
    shares = [(field.name, getattr(answer.shares, field.name)) for field in fields(answer.shares)]
    told = ", ".join(f"{name[:-2].replace('_', ' ')} {seconds:.2f} s" for name, seconds in shares[:-1] if seconds)
    if answer.shares.first_sound_s is not None:
        common.note(f"first sound after {answer.shares.first_sound_s:.2f} s ({told})")
    return [answer.messages[-1], assistant(answer.text)] if answer.text.strip() else []
