"""Models of transformers on videos, sounds and documents: as their own processors and classes, alone and in batches."""

from __future__ import annotations

import json
import shlex
import shutil
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file

from polymodal.backends import load
from polymodal.backends.base import Reply, TextDelta
from polymodal.backends.transformers import TransformersBackend, open_transformers
from polymodal.backends.transformers import video_processor as ours
from polymodal.backends.transformers.folder import open_processor, takes_media
from polymodal.backends.transformers.media import video_content
from polymodal.cli import main
from polymodal.errors import PolymodalError
from polymodal.evaluation.runner import Settings, check_needs, in_grey, run_task
from polymodal.evaluation.task import Example, Task
from polymodal.generation.params import GenerationParams
from polymodal.media.audio import open_audio
from polymodal.media.video import sample_frames
from polymodal.messages import Audio, Document, Image, Video, user
from polymodal.safety.model_folder import check_folder

av = pytest.importorskip("av")

SHORT = GenerationParams(max_new_tokens=8)
SEE = ["llava_next_video", "llava_onevision", "qwen2_5_vl", "internvl", "qwen2_5_omni"]
HEAR = ["qwen2_audio", "qwen2_5_omni"]
VIDEO = {
    **dict.fromkeys(("llava_next_video", "llava_onevision", "internvl"), "<video>\n"),
    "qwen2_5_vl": "<|vision_start|><|video_pad|><|vision_end|>",
    "qwen2_5_omni": "<|vision_bos|><|VIDEO|><|vision_eos|>",
}
AUDIO = {"qwen2_audio": "<|audio_bos|><|AUDIO|><|audio_eos|>\n", "qwen2_5_omni": "<|audio_bos|><|AUDIO|><|audio_eos|>"}

Folders = Callable[[str], Path]
Opened = Callable[[str], TransformersBackend]


def write_clip(path: Path, number: int = 20, seed: int = 0, times: list[int] | None = None) -> Path:
    """A clip of 64x48 frames of one colour and a line that moves, ten a second, with a tone."""
    rng, tone = np.random.default_rng(seed), np.sin(np.arange(1600 * number) / (5 + seed))
    with av.open(str(path), "w") as file:
        video, audio = file.add_stream("mpeg4", rate=10), file.add_stream("aac", rate=16_000, layout="mono")
        video.height, video.width, video.pix_fmt, video.time_base = 48, 64, "yuv420p", Fraction(1, 10)
        for index in range(number):
            pixels = np.empty((48, 64, 3), np.uint8)
            pixels[:], pixels[2 * index % 48] = rng.integers(0, 256, 3), 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = index if times is None else times[index]
            file.mux(video.encode(frame))
        sound = av.AudioFrame.from_ndarray((8000 * tone).astype(np.int16)[None], format="s16", layout="mono")
        sound.sample_rate = 16_000
        for packets in (video.encode(), audio.encode(sound), audio.encode()):
            file.mux(packets)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "one.mp4")


@pytest.fixture(scope="module")
def other(clip: Path) -> Path:
    return write_clip(clip.parent / "other.mp4", 12, seed=3)


@pytest.fixture(scope="module")
def opened(tiny_vlm: Folders) -> Opened:
    models: dict[str, TransformersBackend] = {}

    def open_family(family: str) -> TransformersBackend:
        if family not in models:
            models[family] = open_transformers(check_folder(tiny_vlm(family)), "cpu")
        return models[family]

    return open_family


def chatml(content: str) -> str:
    return f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


def same_as_theirs(model: TransformersBackend, messages: Any, theirs: dict[str, Any]) -> None:
    """Inputs, logits and greedy text."""
    inputs = model.prepare(messages, 8)
    assert torch.equal(inputs["input_ids"], theirs["input_ids"])
    media = {k for k, v in theirs.items() if isinstance(v, torch.Tensor)} - {"input_ids", "attention_mask"}
    assert any("pixel_values" in key or "input_features" in key for key in media)
    for key in media:
        assert torch.equal(torch.as_tensor(inputs[key]), theirs[key]), key
    with torch.inference_mode():
        logits, expected = (model.model(**each).logits for each in (inputs, theirs))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    never = model._never
    made = model.model.generate(**theirs, max_new_tokens=8, do_sample=False, suppress_tokens=never)[0]
    answer = made[theirs["input_ids"].shape[1] :]
    *deltas, reply = model.stream(messages, SHORT)
    assert isinstance(reply, Reply) and all(isinstance(delta, TextDelta) for delta in deltas)
    assert reply.text == "".join(delta.text for delta in deltas)
    assert reply.text == model.tokenizer.decode(answer, skip_special_tokens=True).lstrip(" ")


@pytest.mark.parametrize("family", SEE)
def test_a_video_is_answered_as_by_their_own_processor_and_class(family: str, opened: Opened, clip: Path) -> None:
    model = opened(family)
    frames = sample_frames(clip, 4)
    metadata = {"total_num_frames": 20, "fps": 10.0, "frames_indices": [0, 6, 12, 19], "duration": 2.0}
    given = {"fps": 2.0} if "omni" in family else {}  # 4 frames of 2 seconds
    theirs = open_processor(Path(model.model.config._name_or_path))(
        text=[chatml(f"Look: {VIDEO[family]}What?")], videos=[frames.array], video_metadata=[metadata],
        do_sample_frames=False, return_tensors="pt", **given,
    )  # fmt: skip
    same_as_theirs(model, [user("Look: ", Video(clip, num_frames=4), "What?")], dict(theirs))
    reply = model.generate([user("Look: ", Video(clip, num_frames=4), "What?")], SHORT)
    placeholders = model.processor.tokenizer.convert_tokens_to_ids(model.processor.video_token)
    if family != "internvl":  # which writes its frames as images
        assert reply.usage.image_tokens == int((theirs["input_ids"] == placeholders).sum()) > 0
    assert reply.usage.image_tokens


@pytest.mark.parametrize("family", HEAR)
def test_a_sound_is_answered_as_by_their_own_processor_and_class(family: str, opened: Opened, clip: Path) -> None:
    model, samples = opened(family), open_audio(clip, video=True).samples
    theirs = open_processor(Path(model.model.config._name_or_path))(
        text=[chatml(f"{AUDIO[family]}What?")], audio=[samples], sampling_rate=16_000, return_tensors="pt"
    )
    same_as_theirs(model, [user(Audio(clip), "What?")], dict(theirs))


def test_the_sound_of_a_video_is_woven_in_as_qwen_omni_does(opened: Opened, clip: Path) -> None:
    model, frames = opened("qwen2_5_omni"), sample_frames(clip, 4)
    metadata = {"total_num_frames": 20, "fps": 10.0, "frames_indices": list(frames.indices), "duration": 2.0}
    theirs = open_processor(Path(model.model.config._name_or_path))(
        text=[chatml(f"{VIDEO['qwen2_5_omni']}What?")], videos=[frames.array], video_metadata=[metadata], fps=2.0,
        audio=[open_audio(clip, video=True).samples], do_sample_frames=False, return_tensors="pt",
        load_audio_from_video=True, audio_from_video_indices=[0],
    )  # fmt: skip
    same_as_theirs(
        model, [user(Video(clip, num_frames=4, audio=True), "What?")], {**theirs, "use_audio_in_video": True}
    )
    heard = model.prepare([user(Video(clip, num_frames=4, audio=True, end=1.0), "What?")], 8)
    assert heard["feature_attention_mask"].sum() == 100  # hundredths of a second, of the same piece as the frames


def test_a_video_without_sound_is_only_seen(opened: Opened, tmp_path: Path) -> None:
    frames = [PILImage.new("RGB", (60, 60), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=500)
    model, clip = opened("qwen2_5_omni"), tmp_path / "a.gif"
    with_sound, without = (
        model.prepare([user(Video(clip, num_frames=2, audio=audio), "What?")], 4) for audio in (True, None)
    )
    assert torch.equal(with_sound["input_ids"], without["input_ids"]) and "input_features" not in with_sound


@pytest.mark.parametrize("family", [*SEE, "qwen2_audio"])
def test_a_batch_answers_as_one_by_one(family: str, opened: Opened, clip: Path, other: Path) -> None:
    model = opened(family)
    asked: list[Any] = [[user("Hello")], [user("Hi there, you")]]
    if "video" in model.takes:
        asked += [
            [user(Video(clip, num_frames=2), "What?")], [user(Video(other, num_frames=2), "What is it?")],
            [user(Image(PILImage.new("RGB", (40, 30), (9, 99, 200))), "What?")],
            [user(Video(other, num_frames=4), "x")], [user(Video("absent.mp4"), "x")],
        ]  # fmt: skip
    if "audio" in model.takes:
        asked += [[user(Audio(clip), "What?")], [user(Audio(other), "And what is this?")]]
    if model.takes == ("image", "video", "audio"):
        asked += [[user(Video(one, num_frames=2, audio=True), "What?")] for one in (clip, other)]
    answers = model.generate_batch(asked, SHORT)
    assert sum(isinstance(answer, PolymodalError) for answer in answers) == ("video" in model.takes)
    assert len({str(answer) for answer in answers}) > 2  # what is seen and heard matters
    for messages, answer in zip(asked, answers, strict=True):
        if isinstance(answer, str):
            assert answer == model.generate(messages, SHORT).text.strip()


def test_a_batch_of_videos_runs_the_model_once(
    opened: Opened, clip: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = opened("llava_onevision"), []
    own = model.model.generate
    monkeypatch.setattr(model.model, "generate", lambda **given: calls.append(len(given["input_ids"])) or own(**given))
    model.generate_batch([[user(Video(one, num_frames=2), "What?")] for one in (clip, other, clip)], SHORT)
    assert calls == [3]


def test_what_a_model_does_not_take_is_one_clear_line(opened: Opened, clip: Path, tmp_path: Path) -> None:
    taken = {family: opened(family).takes for family in [*SEE, "qwen2_audio", "llava_next"]}
    assert taken == {
        **dict.fromkeys(SEE, ("image", "video")), "qwen2_5_omni": ("image", "video", "audio"),
        "qwen2_audio": ("audio",), "llava_next": ("image",),
    }  # fmt: skip
    for family, part, words in [
        ("llava_next", Video(clip), "message 1: video parts cannot .* takes text and image parts$"),
        ("qwen2_audio", Image(PILImage.new("RGB", (9, 9))), "image parts cannot .* takes text and audio parts$"),
        ("qwen2_audio", Document("a.pdf"), "document parts cannot"),
        ("llava_onevision", Audio(clip), "audio parts cannot .* takes text and image and video parts$"),
        ("llava_onevision", Video(clip, audio=True), r"the sound of a video \(audio=True\) cannot"),
        ("llava_onevision", Video("absent.mp4"), "absent.mp4: no such file"),
        ("llava_onevision", Video(clip, start=5.0), "segment starts at 5 seconds, the video lasts 2"),
        ("qwen2_audio", Audio("absent.wav"), "absent.wav: no such file"),
    ]:
        with pytest.raises(PolymodalError, match=words):
            opened(family).generate([user(part, "What?")], SHORT)


def test_a_document_is_given_page_by_page(opened: Opened, tmp_path: Path) -> None:
    pages = [PILImage.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    model = opened("llava_next")
    expected = model.prepare([user("Page 1:\n", Image(pages[0]), "\nPage 2:\n", Image(pages[1]), "What?")], 4)
    found = model.prepare([user(Document(tmp_path / "a.tif"), "What?")], 4)
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert torch.equal(found["pixel_values"], expected["pixel_values"])


def test_how_many_frames_are_taken(opened: Opened, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = opened("qwen2_5_vl").processor

    def indices(**settings: Any) -> list[int]:
        found: list[int] = video_content(Video(clip, **settings), processor)["metadata"]["frames_indices"]
        return found

    assert indices() == np.linspace(0, 19, 8, dtype=int).tolist()
    monkeypatch.setattr(processor.video_processor, "num_frames", 3)
    assert indices() == [0, 9, 19] and indices(num_frames=2) == [0, 19] and indices(times=(0.5,)) == [5]
    monkeypatch.setattr(processor.video_processor, "num_frames", None)
    monkeypatch.setattr(processor.video_processor, "fps", 2)
    assert indices() == [0, 5, 10, 15] and indices(num_frames=2) == [0, 19] and indices(fps=1.0) == [0, 10]
    monkeypatch.setattr(processor.video_processor, "min_frames", None)  # Qwen's is 4
    assert indices(start=1.0, end=1.5) == [10]
    monkeypatch.setattr(processor.video_processor, "min_frames", 6)
    assert indices() == np.linspace(0, 19, 6, dtype=int).tolist() and indices(fps=1.0) == [0, 10]
    monkeypatch.setattr(processor.video_processor, "min_frames", None)
    monkeypatch.setattr(processor.video_processor, "max_frames", 2)
    assert indices() == [0, 19]
    with pytest.raises(PolymodalError, match="0 frames are asked for"):
        indices(num_frames=0)


def test_times_are_told_as_they_are(opened: Opened, clip: Path, tmp_path: Path) -> None:
    def told(part: Video) -> tuple[list[float], float]:
        metadata = video_content(part, opened("qwen2_5_vl").processor)["metadata"]
        span = metadata["total_num_frames"] / metadata["fps"]
        return [index / metadata["fps"] for index in metadata["frames_indices"]], span

    uneven = write_clip(tmp_path / "uneven.mp4", 4, times=[0, 1, 12, 30])
    times, span = told(Video(uneven, num_frames=4))
    assert times == pytest.approx([0, 0.1, 1.2, 3.0], abs=0.002) and span == pytest.approx(3.1, abs=0.2)
    assert told(Video(clip, num_frames=2)) == ([0.0, 1.9], 2.0)
    assert told(Video(clip, num_frames=2, start=1.0, end=1.5)) == ([1.0, 1.4], 0.5)
    assert told(Video(clip, num_frames=2, start=1.0, end=99.0)) == ([1.0, 1.9], 1.0)
    made = opened("qwen2_5_vl").prepare([user(Video(clip, num_frames=4, start=1.0), "What?")], 4)
    assert float(torch.as_tensor(made["second_per_grid_ts"])[0]) == pytest.approx(0.5)  # two frames of four in a second


def test_a_sound_that_is_cut_off_is_not_cut_in_silence(opened: Opened, clip: Path, tmp_path: Path) -> None:
    long = write_clip(tmp_path / "long.mp4", 40)
    with pytest.warns(UserWarning, match=r"of a sound of 4\.\d seconds the model hears the first 2\.0; cut it"):
        opened("qwen2_audio").generate([user(Audio(long), "What?")], SHORT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened("qwen2_audio").generate([user(Audio(clip), "What?")], SHORT)


def test_load_opens_them(tiny_vlm: Folders, clip: Path) -> None:
    for family, part in (("qwen2_audio", Audio(clip)), ("llava_onevision", Video(clip))):
        model = load(tiny_vlm(family), "cpu")
        assert isinstance(model, TransformersBackend)
        assert model.generate([user(part, "What?")], SHORT).usage.completion_tokens == 8
    assert takes_media("qwen2_5_omni") and takes_media("voxtral") and not takes_media("llama") and not takes_media("t5")


def test_of_a_model_that_also_speaks_the_writing_part_is_opened(tiny_vlm: Folders, tmp_path: Path, clip: Path) -> None:
    """As the hub's folders have it: the weights of all parts, each with its prefix."""
    source, folder = tiny_vlm("qwen2_5_omni"), tmp_path / "omni"
    shutil.copytree(source, folder)
    thinker = json.loads((source / "config.json").read_text())
    whole = {"model_type": "qwen2_5_omni", "architectures": ["Qwen2_5OmniModel"], "thinker_config": thinker}
    (folder / "config.json").write_text(json.dumps(whole))
    tensors = {f"thinker.{name}": value for name, value in load_file(source / "model.safetensors").items()}
    tensors |= {"talker.codec_head.weight": torch.zeros(4, 4), "token2wav.code2wav.layers.0.weight": torch.zeros(4)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model, part = load(folder, "cpu"), open_transformers(check_folder(source), "cpu")
    messages = [user(Audio(clip), Video(clip, num_frames=2), "What?")]
    assert model.generate(messages, SHORT).text == part.generate(messages, SHORT).text


def test_frames_are_resized_and_normalised_as_by_pillow_and_by_hand() -> None:
    rows, columns = np.mgrid[0:45, 0:80].astype(float)
    smooth = np.stack([100 + rows, 40 + columns, 128 + 60 * np.sin(rows / 9) * np.cos(columns / 11)], -1)
    pixels = smooth.round().astype(np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    for mode, pillow in (("BICUBIC", PILImage.Resampling.BICUBIC), ("BILINEAR", PILImage.Resampling.BILINEAR)):
        for height, width in ((28, 28), (90, 100), (17, 200)):
            scaled = ours.resize(tensor[None], (height, width), ours.InterpolationMode[mode])[0].permute(1, 2, 0)
            expected = np.asarray(PILImage.fromarray(pixels).resize((width, height), pillow))
            assert scaled.dtype == torch.uint8
            assert np.abs(scaled.numpy().astype(int) - expected).max() <= 2
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    frames = np.repeat(pixels[None, :28, :28], 2, axis=0)
    settings = {"size": {"height": 28, "width": 28}, "image_mean": mean, "image_std": std}
    made = ours._class("LlavaOnevisionVideoProcessor")(**settings)([frames], return_tensors="pt")
    expected = (frames.transpose(0, 3, 1, 2) / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    np.testing.assert_allclose(made["pixel_values_videos"][0], expected, atol=1e-5)
    cut = ours._class("LlavaNextVideoVideoProcessor")(
        size={"shortest_edge": 45}, crop_size={"height": 28, "width": 28}, do_normalize=False, do_rescale=False
    )([pixels[None]], return_tensors="pt")["pixel_values_videos"][0, 0]
    assert torch.equal(cut.permute(1, 2, 0).to(torch.uint8), torch.from_numpy(pixels[8:36, 26:54]))


@pytest.mark.parametrize("name", [
    "Qwen3VLVideoProcessor", "SmolVLMVideoProcessor", "VideoLlavaVideoProcessor", "Glm4vVideoProcessor",
    "PerceptionLMVideoProcessor", "VideoLlama3VideoProcessor", "Gemma4VideoProcessor",
])  # fmt: skip
def test_other_video_processors_work_without_torchvision(name: str) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (4, 60, 90, 3), dtype=np.uint8)
    metadata = {"total_num_frames": 4, "fps": 2.0, "frames_indices": [0, 1, 2, 3], "duration": 2.0}
    made = ours._class(name)()([frames], return_tensors="pt", do_sample_frames=False, video_metadata=[metadata])
    assert next(iter(made.values())).numel() > 3 * 4 * 100


def test_the_evaluation_asks_about_videos_and_sounds_beside_controls(
    opened: Opened, clip: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for family, kind, part in (("llava_onevision", "video", Video), ("qwen2_audio", "audio", Audio)):
        task = Task("tiny", "tiny", "exact", ("test",), lambda *_: iter(()), max_new_tokens=4, needs=(kind,))
        asked = [Example(file.name, (user(part(file), "What?"),), ("x",)) for file in (clip, other)]
        check_needs(opened(family), task)
        run = run_task(opened(family), task, asked, Settings(blind=True, cached=False))
        assert [sample.error for sample in run.samples] == [None, None] and run.batch_invariant
        hidden = in_grey(asked[0].messages)
        expected = opened(family).generate(hidden, GenerationParams(max_new_tokens=4)).text.strip()
        assert run.samples[0].blind == expected


def test_the_commands_of_the_docs(
    tiny_vlm: Folders, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those about published models, with tiny ones in their place."""
    pytest.importorskip("pypdfium2")
    page = Path(__file__).parents[2] / "docs" / "video-audio.md"
    lines = [line for line in page.read_text().splitlines() if line.startswith("polymodal generate --model ")]
    kinds = {"NeXT-Video": "llava_next_video", "Qwen2-Audio": "qwen2_audio", "Omni": "qwen2_5_omni", "VL": "qwen2_5_vl"}
    monkeypatch.chdir(tmp_path)
    shutil.copy(clip, "clip.mp4")
    with av.open(str(clip)) as source, av.open("speech.mp3", "w", format="wav") as file:
        track = file.add_stream("pcm_s16le", rate=16_000, layout="mono")
        for frame in source.decode(audio=0):
            for part in av.AudioResampler("s16", "mono", 16_000).resample(frame):
                file.mux(track.encode(part))
    pages = [PILImage.new("RGB", (60, 40), colour) for colour in ("red", "lime", "blue")]
    pages[0].save("paper.pdf", save_all=True, append_images=pages[1:])
    found = []
    for line in lines:
        argv = shlex.split(line)[1:]
        family = next(family for name, family in kinds.items() if name in argv[2])
        argv[2] = str(tiny_vlm(family))
        assert main([*argv, "--max-new-tokens", "4", "--device", "cpu"]) == 0, capsys.readouterr().err
        found.append(family)
    assert sorted(found) == sorted(kinds.values()) and capsys.readouterr().out


@pytest.mark.parametrize(
    ("family", "token"),
    [("llava_next_video", "<video>"), ("qwen2_5_vl", "<|video_pad|>"), ("qwen2_audio", "<|AUDIO|>")],
)
def test_a_typed_control_token_stays_text_beside_media(family: str, token: str, opened: Opened, clip: Path) -> None:
    model = opened(family)
    part = Audio(clip) if "audio" in family else Video(clip, num_frames=2)
    typed, plain = (model.prepare([user(part, text)], 4)["input_ids"] for text in (f"what is {token}?", "what is ?"))
    placeholder = model.tokenizer.convert_tokens_to_ids(token)
    assert int((typed == placeholder).sum()) == int((plain == placeholder).sum()) > 0
    assert typed.numel() == plain.numel() + len(token)
