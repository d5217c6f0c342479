"""Videos and sounds in one model: planned, merged in order, the same alone and in a batch, saved and loaded."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from polymodal.backends import load_processor
from polymodal.backends.local import LocalBackend, processor_of
from polymodal.checkpoints.model_folder import load_model, save_model
from polymodal.config import (
    AudioConfig,
    ModelConfig,
    OldFramesConfig,
    ProjectorConfig,
    RopeScalingConfig,
    TemporalAttentionConfig,
    TemporalConfig,
    VideoConfig,
)
from polymodal.errors import CheckpointError, ConfigError, MediaError, PolymodalError
from polymodal.generation.params import GenerationParams
from polymodal.interop.describe import describe
from polymodal.media_plan import AudioPlan, Size, VideoPlan
from polymodal.messages import Audio, Image, Video, assistant, user
from polymodal.modeling import ctranslate2
from polymodal.modeling.build import add_senses, build_model
from polymodal.modeling.vlm import MultimodalLM
from polymodal.processing.collate import collate, collate_packed
from polymodal.video_plan import frames_within
from tests.media.makers import clip, tone


@pytest.fixture(scope="module")
def ears(tiny_ears_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(tiny_ears_folder, tmp_path_factory.mktemp("ears") / "audio"))


@pytest.fixture(scope="module")
def config(tiny_model_config: ModelConfig, ears: Path) -> ModelConfig:
    temporal = TemporalConfig(
        type="attention", attention=TemporalAttentionConfig(hidden_size=16, num_attention_heads=2)
    )
    return tiny_model_config.model_copy(
        update={
            "video": VideoConfig(num_frames=4, temporal=temporal),
            "audio": AudioConfig(audio_tower=str(ears), stack=2, projector=ProjectorConfig(mm_projector_type="linear")),
        }
    )


@pytest.fixture
def model(config: ModelConfig) -> tuple[MultimodalLM, PreTrainedTokenizerBase]:
    torch.manual_seed(0)
    model, tokenizer = build_model(config)
    assert model.temporal_encoder is not None
    torch.nn.init.normal_(model.temporal_encoder.output.weight, std=0.1)  # it starts as the identity
    return model, tokenizer


def embed(model: MultimodalLM, batch: Any) -> torch.Tensor:
    given = batch.inputs()
    wanted = ("input_ids", "plans", "sample_of_image", "pixel_values", "media_places", "audio_values")
    with torch.no_grad():
        return model.embed(**{name: given[name] for name in wanted})


@pytest.fixture
def media(tmp_path: Path, photo: Path) -> dict[str, Any]:
    return {
        "image": Image(photo),
        "video": Video(clip(tmp_path / "a.mp4")),
        "audio": Audio(tone(tmp_path / "a.wav")),
        "long": Audio(tone(tmp_path / "b.wav", 1.3)),  # windows of a second
    }


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image as PILImage

    path = tmp_path_factory.mktemp("photo") / "p.png"
    PILImage.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)).save(path)
    return path


def test_plans_say_how_many_tokens_there_are(model: Any, config: ModelConfig, media: dict[str, Any]) -> None:
    processor = processor_of(*model, config)
    sample = processor([user(media["image"], "a", media["video"], "b", media["long"], "?")])
    image, video, sound = sample.plans
    assert isinstance(video, VideoPlan) and isinstance(sound, AudioPlan)
    assert (image.num_tokens, video.num_tokens, sound.num_tokens) == (16, 4 * 16, 25 + 8)
    assert video.times == (0.0, 0.5, 1.25, 2.0) and sound.frames == (100, 30) and sound.tokens == (25, 8)
    assert [slot.modality for slot in sample.slots] == ["image", "video", "audio"]
    assert [slot.length for slot in sample.slots] == [plan.num_tokens for plan in sample.plans]
    assert int((sample.input_ids == processor.image_token_id).sum()) == 16 + 64 + 33
    assert sample.pixels is not None and [len(tiles) for tiles in sample.pixels] == [1, 4]
    assert sample.sounds is not None and sample.sounds[0].shape == (2, 80, 100)


def test_each_medium_changes_its_own_tokens_and_no_others(
    model: Any, config: ModelConfig, media: dict[str, Any], tmp_path: Path
) -> None:
    processor = processor_of(*model, config)

    def tokens(video: Video, audio: Audio) -> list[torch.Tensor]:
        sample = processor([user(audio, "a", video, media["image"], "?")])
        embeds = embed(model[0], collate([sample], 0))[0]
        return [embeds[slot.start : slot.start + slot.length] for slot in sample.slots]

    before = tokens(media["video"], media["audio"])
    other = tokens(Video(clip(tmp_path / "other.mp4", frames=5)), media["audio"])
    assert torch.equal(before[0], other[0]) and torch.equal(before[2], other[2])
    assert not torch.allclose(before[1], other[1], atol=1e-3)
    louder = tokens(media["video"], Audio(tone(tmp_path / "c.wav", pitch=880)))
    assert torch.equal(before[1], louder[1]) and not torch.allclose(before[0], louder[0], atol=1e-3)


def test_a_video_is_what_its_parts_make_of_it(model: Any, config: ModelConfig, media: dict[str, Any]) -> None:
    whole, tokenizer = model
    sample = processor_of(whole, tokenizer, config)([user(media["video"], "?")])
    assert sample.pixels is not None
    features = whole.encode_images(sample.pixels[0])
    times = torch.tensor([sample.plans[0].times])
    expected = whole.project(whole.temporal_encoder(features[None], times)[0]).flatten(0, 1)
    slot = sample.slots[0]
    found = embed(whole, collate([sample], 0))[0, slot.start : slot.start + slot.length]
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, whole.project(features).flatten(0, 1), atol=1e-3)  # time was looked at


@pytest.mark.parametrize("side", ["right", "left", "packed"])
def test_a_batch_gives_each_sample_what_it_gets_alone(
    model: Any, config: ModelConfig, media: dict[str, Any], side: str
) -> None:
    whole, tokenizer = model
    processor = processor_of(whole, tokenizer, config)
    asked = [
        [user(media["video"], "Which way?"), assistant("right")],
        [user("hello"), assistant("hi")],
        [user(media["long"], "and", media["image"], "?"), assistant("two")],
        [user(media["audio"], "?"), assistant("one"), user(media["video"], "?"), assistant("x")],
    ]
    samples = [processor(messages) for messages in asked]
    batch = collate_packed(samples) if side == "packed" else collate(samples, 0, side)  # type: ignore[arg-type]
    with torch.no_grad():
        together = whole(**batch.inputs()).losses
        alone = torch.cat([whole(**collate([sample], 0).inputs()).losses for sample in samples])
    assert torch.allclose(together, alone, atol=1e-5)


def test_features_stand_for_pixels_and_sounds(model: Any, config: ModelConfig, media: dict[str, Any]) -> None:
    whole, tokenizer = model
    processor = processor_of(whole, tokenizer, config)
    messages = [user(media["audio"], media["video"], media["long"]), assistant("x")]
    batch = collate([processor(messages)], 0)
    assert batch.pixel_values is not None and batch.audio_values is not None
    sounds = [plan for plan in batch.plans if isinstance(plan, AudioPlan)]
    with torch.no_grad():
        kept = dataclasses.replace(
            batch,
            pixel_values=None,
            features=whole.encode_images(batch.pixel_values),
            audio_values=None,
            audio_features=whole.encode_audio(batch.audio_values, sounds),
        )
        assert kept.audio_features is not None and kept.audio_features.shape == (13 + 33, 32)
        assert torch.allclose(whole(**kept.inputs()).losses, whole(**batch.inputs()).losses, atol=1e-6)


@pytest.mark.parametrize(
    ("temporal", "tokens"),
    [
        (None, 4 * 16),
        (TemporalConfig(type="mean"), 16),
        (TemporalConfig(type="spatio_temporal_pool"), 2 * 4),
        (TemporalConfig(type="spatio_temporal_pool", stride=(3, 1, 2)), 2 * 8),
        (TemporalConfig(type="attention", attention=TemporalAttentionConfig(num_attention_heads=2, pool="mean")), 16),
    ],
)
def test_temporal_encoders_give_what_is_planned(
    config: ModelConfig, media: dict[str, Any], temporal: TemporalConfig | None, tokens: int
) -> None:
    config = config.model_copy(update={"video": VideoConfig(num_frames=4, temporal=temporal)})
    model, tokenizer = build_model(config)
    processor = processor_of(model, tokenizer, config)
    samples = [
        processor([user(media["image"], media["video"]), assistant("x")]),
        processor([user(media["video"]), assistant("y")]),
    ]
    assert samples[1].plans[0].num_tokens == tokens
    with torch.no_grad():
        assert model(**collate(samples, 0).inputs()).losses.isfinite().all()


def test_what_the_question_asks_of_a_video(model: Any, config: ModelConfig, media: dict[str, Any]) -> None:
    source = media["video"].source
    processor = processor_of(*model, config)

    def times(**asked: Any) -> tuple[float, ...]:
        plan = processor([user(Video(source, **asked))], pixels=False).plans[0]
        assert isinstance(plan, VideoPlan)
        return plan.times

    assert times(num_frames=2) == (0.0, 2.0)
    assert times(fps=1.0) == (0.0, 1.0, 2.0)
    assert times(times=(1.0, 0.25)) == (1.0, 0.25)
    assert times(start=1.0, num_frames=3) == (1.0, 1.5, 2.0)
    assert times(start=1.0) == (1.0, 1.25, 1.5, 2.0)
    thrifty = processor.with_config(
        config.model_copy(update={"video": config.video.model_copy(update={"max_tokens": 40})})
    )
    assert len(thrifty([user(Video(source))], pixels=False).plans[0].times) == 2
    with pytest.raises(ConfigError, match="max_frames"):
        times(num_frames=100)


def test_the_model_is_told_the_times(model: Any, config: ModelConfig, media: dict[str, Any]) -> None:
    said = "{num_frames} frames of {duration:.2f} s, at {times}: "
    config = config.model_copy(update={"video": config.video.model_copy(update={"time_instruction": said})})
    processor = processor_of(*model, config)
    source = media["video"].source  # nine frames, a quarter of a second each
    for asked, told in (({"num_frames": 2}, "0.00s, 2.00s"), ({"times": (0.5,)}, "0.50s")):
        sample = processor([user("A", Video(source, **asked), "B")])
        text = model[1].decode(sample.input_ids[sample.input_ids != processor.image_token_id])
        assert f"A{told.count('.')} frames of 2.25 s, at {told}: B" in text
    with pytest.raises(ConfigError, match="time_instruction knows"):
        VideoConfig(time_instruction="{start}")


def test_a_video_with_its_sound(model: Any, config: ModelConfig, tmp_path: Path) -> None:
    processor = processor_of(*model, config)
    path = clip(tmp_path / "s.mkv", sound=True)
    assert [s.modality for s in processor([user(Video(path, audio=True))], pixels=False).slots] == ["video", "audio"]
    assert [s.modality for s in processor([user(Video(path))], pixels=False).slots] == ["video"]
    plan = processor([user(Video(path, start=0.25, end=0.5, audio=True))], pixels=False).plans[1]
    assert isinstance(plan, AudioPlan) and plan.frames == (25,)
    with pytest.raises(MediaError, match="from 3 to 1 seconds there are 0 of sound"):
        processor([user(Audio(path, start=3))], pixels=False)
    silent = clip(tmp_path / "silent.mp4")
    assert [s.modality for s in processor([user(Video(silent, audio=True))], pixels=False).slots] == ["video"]


def test_a_folder_keeps_ears_and_eyes(model: Any, config: ModelConfig, media: dict[str, Any], tmp_path: Path) -> None:
    whole, tokenizer = model
    save_model(tmp_path / "model", whole, config, tokenizer)
    again = load_model(tmp_path / "model")
    messages = [user(media["audio"], media["video"], "?"), assistant("x")]
    losses = []
    for each, rules in ((whole, config), (again.model, again.config)):
        batch = collate([processor_of(each, tokenizer, rules)(messages)], 0)
        with torch.no_grad():
            losses.append(each(**batch.inputs()).losses)
    assert torch.equal(*losses)
    backend = LocalBackend(again.model, tokenizer, again.config)
    assert backend.takes == ("image", "video", "audio")
    params = GenerationParams(max_new_tokens=4)
    asked = [[user(media["video"], "?")], [user(media["long"], "?")], [user("?")]]
    assert backend.generate_batch(asked, params) == [backend.answer(each, params) for each in asked]


def test_a_conversation_that_goes_on_hears_and_sees_once(
    model: Any, config: ModelConfig, media: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, tokenizer = model
    plain, keeping = LocalBackend(whole, tokenizer, config), LocalBackend(whole, tokenizer, config)
    plain.keeps_last = False
    params = GenerationParams(max_new_tokens=6)
    begun = [user(media["long"], "a", media["video"], "b", media["image"], "?")]
    talks = [begun]
    for more in (["?"], [media["audio"], media["image"], media["video"]]):
        talks.append([*talks[-1], assistant("x"), user(*more, "and?")])
    # Another sound in between: what stands behind it is another text to the model.
    talks.append([user(media["long"], "a", media["audio"], "b", media["video"], media["image"], "?")])
    expected = [plain.generate(talk, params).text for talk in talks]
    seen: list[int] = []
    heard: list[int] = []
    see, hear = whole.encode_images, whole.encode_audio
    monkeypatch.setattr(whole, "encode_images", lambda pixels: seen.append(len(pixels)) or see(pixels))
    monkeypatch.setattr(whole, "encode_audio", lambda values, plans: heard.append(len(values)) or hear(values, plans))
    assert [keeping.generate(talk, params).text for talk in talks] == expected
    assert seen == [4 + 1, 1 + 4, 4 + 1] and heard == [2, 1, 1]


def test_kept_answers_are_those_of_the_same_rules(model: Any, config: ModelConfig) -> None:
    assert config.video is not None and config.audio is not None
    rope = RopeScalingConfig(rope_type="linear", factor=2)
    others = [
        {"video": config.video.model_copy(update={"num_frames": 5})},
        {"audio": config.audio.model_copy(update={"max_seconds": 5.0})},
        {"llm": config.llm.model_copy(update={"rope_scaling": rope})},  # which no weight shows
    ]
    found = {LocalBackend(*model, config.model_copy(update=change)).fingerprint() for change in ({}, {}, *others)}
    assert len(found) == 1 + len(others)


def test_another_audio_tower_is_refused(model: Any, config: ModelConfig, ears: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "model", *(model[0], config, model[1]))
    kept = (ears / "model.safetensors").read_bytes()
    tower = WhisperEncoder.from_pretrained(ears)
    with torch.no_grad():
        tower.conv1.weight.mul_(2)
    try:
        tower.save_pretrained(ears)
        with pytest.raises(CheckpointError, match="trained behind another audio tower"):
            load_model(tmp_path / "model")
    finally:
        (ears / "model.safetensors").write_bytes(kept)


def test_a_bundled_audio_tower_travels(model: Any, config: ModelConfig, tmp_path: Path) -> None:
    save_model(tmp_path / "model", model[0], config, model[1], audio_trained=True)
    again = load_model(tmp_path / "model")
    assert again.config.audio is not None and again.config.audio.audio_tower == "bundled"
    for name, weight in model[0].audio_encoder.state_dict().items():
        assert torch.equal(again.model.audio_encoder.state_dict()[name], weight), name


def test_a_folder_is_described_with_ears_and_temporal_encoder(model: Any, config: ModelConfig, tmp_path: Path) -> None:
    save_model(tmp_path / "m", model[0], config, model[1], audio_trained=True)
    found = {part.name: part for part in describe(tmp_path / "m").parts}
    whole = {
        name: getattr(model[0], f"{name}_encoder" if name == "audio" else name)
        for name in found.keys() - {"llm", "vision"}
    }
    assert whole.keys() == {"audio", "projector", "temporal_encoder", "audio_projector"}
    for name, module in whole.items():
        assert found[name].parameters == sum(weight.numel() for weight in module.state_dict().values()), name
    assert (found["temporal_encoder"].kind, found["audio_projector"].kind) == ("attention", "linear")
    assert describe(tmp_path / "m").videos["num_frames"] == 4 and describe(tmp_path / "m").sounds["stack"] == 2


def test_media_that_a_model_does_not_take(tiny_model_config: ModelConfig, media: dict[str, Any]) -> None:
    model, tokenizer = build_model(tiny_model_config)
    processor = processor_of(model, tokenizer, tiny_model_config)
    with pytest.raises(PolymodalError, match="was not made for videos"):
        processor([user(media["video"])])
    with pytest.raises(PolymodalError, match="has no audio encoder"):
        processor([user(media["audio"])])
    assert LocalBackend(model, tokenizer, tiny_model_config).takes == ("image",)


def test_senses_are_added_to_a_model_that_has_none(tiny_model_config: ModelConfig, config: ModelConfig) -> None:
    model, _ = build_model(tiny_model_config)
    projector = model.projector
    add_senses(model, config)
    assert model.temporal_encoder is not None and model.audio_encoder is not None and model.projector is projector
    first = model.audio_projector
    assert config.video is not None
    add_senses(model, config.model_copy(update={"video": config.video.model_copy(update={"max_frames": 100})}))
    assert model.audio_projector is first
    assert model.temporal_encoder.max_frames == 100  # as in the folder that is written of it


def test_parts_that_a_batch_does_not_need_run_all_the_same(
    model: Any, config: ModelConfig, media: dict[str, Any]
) -> None:
    whole, tokenizer = model
    processor = processor_of(whole, tokenizer, config)
    whole.train()
    parts = ("projector", "temporal_encoder", "audio_projector", "audio_encoder")
    for messages in ([user("?")], [user(media["image"])], [user(media["video"])], [user(media["audio"])]):
        whole.zero_grad(set_to_none=True)
        batch = collate([processor([*messages, assistant("x")])], 0)
        usual = whole(**batch.inputs()).losses.detach()
        out = whole(**batch.inputs(), touch_media=True)
        assert torch.allclose(out.losses, usual, atol=1e-6)
        out.loss_sum.backward()
        for part in parts:
            for name, weight in getattr(whole, part).named_parameters():
                if weight.requires_grad:
                    assert weight.grad is not None, (part, name, messages)


def test_without_its_package_a_model_goes_on_seeing(
    config: ModelConfig, ears: Path, media: dict[str, Any], tmp_path: Path, private_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert config.audio is not None
    named = config.audio.model_copy(update={"audio_tower": "whisper_base"})
    config = config.model_copy(update={"audio": named})
    monkeypatch.setattr(ctranslate2, "packaged_parts", lambda name: None)
    kept = shutil.copytree(ears, ctranslate2.converted_folder("whisper_base"))
    save_model(tmp_path / "model", *_parts(config))
    assert LocalBackend(*_opened(tmp_path / "model")).takes == ("image", "video", "audio")

    shutil.rmtree(kept)
    backend = LocalBackend(*_opened(tmp_path / "model"))
    assert backend.takes == ("image", "video")
    assert backend.generate([user(media["video"], "?")], GenerationParams(max_new_tokens=2)).text is not None
    for processor in (backend.processor, load_processor(tmp_path / "model")):
        with pytest.raises(PolymodalError, match="whisper_base is not installed; run `polymodal fetch` once"):
            processor([user(media["audio"])])
    with pytest.raises(CheckpointError, match="would lose what it has learnt to hear: whisper_base is not on this"):
        save_model(tmp_path / "again", backend.model, backend.config, backend.tokenizer)


def _parts(config: ModelConfig) -> tuple[Any, ...]:
    model, tokenizer = build_model(config)
    return model, config, tokenizer


def _opened(folder: Path) -> tuple[Any, ...]:
    loaded = load_model(folder)
    return loaded.model, loaded.tokenizer, loaded.config


@pytest.mark.parametrize(
    ("temporal", "stride", "tokens"),
    [
        (None, (2, 2, 2), 2 * 4 + 2 * 16),  # 3 of 5 frames pooled to 2 of 2 x 2
        (TemporalConfig(type="attention", attention=TemporalAttentionConfig(num_attention_heads=2)), (3, 1, 1), 3 * 16),
        (TemporalConfig(type="spatio_temporal_pool", stride=(1, 2, 2)), (1, 2, 1), 3 * 2 + 2 * 4),
    ],
)
def test_old_frames_are_pooled_and_new_ones_stay(
    config: ModelConfig, tmp_path: Path, temporal: TemporalConfig | None, stride: tuple[int, int, int], tokens: int
) -> None:
    torch.manual_seed(0)
    rule = OldFramesConfig(keep=2, stride=stride)
    whole = config.model_copy(update={"video": VideoConfig(num_frames=5, temporal=temporal)})
    pooled = config.model_copy(update={"video": whole.video.model_copy(update={"old_frames": rule})})
    model, tokenizer = build_model(whole)
    asked = [user(Video(clip(tmp_path / "a.mp4")), "?")]
    found = []
    for each in (whole, pooled):
        sample = processor_of(model, tokenizer, each)(asked)
        slot = sample.slots[0]
        assert slot.length == sample.plans[0].num_tokens
        found.append(embed(model, collate([sample], 0))[0, slot.start : slot.start + slot.length])
    assert len(found[1]) == tokens
    grid = sample.plans[0].tokens
    assert torch.equal(found[1][-2 * grid.area :], found[0][-2 * grid.area :])
    old = found[0][: 3 * grid.area].view(3, grid.height, grid.width, -1)
    t, h, w = stride
    assert torch.allclose(found[1][0], old[:t, :h, :w].mean(dim=(0, 1, 2)), atol=1e-6)
    # The budget counts what is left of them, and a short video is left alone.
    thrifty = pooled.video.model_copy(update={"max_tokens": tokens})
    processor = processor_of(model, tokenizer, pooled.model_copy(update={"video": thrifty}))
    assert len(processor(asked, pixels=False).plans[0].times) >= 5 - stride[0] + 1
    short = processor([user(Video(tmp_path / "a.mp4", num_frames=2), "?")], pixels=False).plans[0]
    assert (short.num_tokens, short.old) == (2 * grid.area, 0)


def test_old_frames_of_tokens_without_a_grid() -> None:
    video = VideoConfig(old_frames=OldFramesConfig(keep=1))
    with pytest.raises(ConfigError, match="lie in no grid"):
        frames_within(8, video.model_copy(update={"max_tokens": 100}), Size(1, 9))
    assert VideoConfig(old_frames={"keep": 1, "stride": (2, 1, 1)}).old_frames is not None
