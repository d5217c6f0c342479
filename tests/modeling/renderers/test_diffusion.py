"""Pipelines of diffusers through `load_renderer`, built tiny from their configurations, saved, loaded offline."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers")

from polymodal.errors import CheckpointError, ConfigError
from polymodal.modeling.renderers import Renderer, RenderRequest, load_renderer
from polymodal.modeling.renderers.base import LONGEST_PROMPT
from polymodal.modeling.renderers.diffusion import DiffusersRenderer, shorten
from tests.modeling.renderers.pipelines import clip_tokenizer

QUICK: dict[str, Any] = {"width": 32, "height": 32, "steps": 2}


@pytest.fixture(scope="module")
def draws(tiny_pipeline: Callable[[str], Path]) -> Any:
    return load_renderer(tiny_pipeline("stable_diffusion"), "cpu")


def changed(folder: Path, target: Path, **index: Any) -> Path:
    """A copy of a pipeline with other values in its index."""
    shutil.copytree(folder, target)
    file = target / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | index))
    return target


def asked_for(renderer: Any, monkeypatch: pytest.MonkeyPatch, pipe: str = "pipe") -> dict[str, Any]:
    """Keeps what the pipeline is given."""
    kept: dict[str, Any] = {}
    run = DiffusersRenderer._run

    def keep(self: Any, pipe: Any, given: dict[str, Any], seed: int) -> np.ndarray:
        kept.update(given)
        return run(self, pipe, given, seed)

    monkeypatch.setattr(DiffusersRenderer, "_run", keep)
    return kept


def test_an_image_is_the_same_for_a_seed(draws: Renderer, tiny_pipeline: Callable[[str], Path]) -> None:
    assert draws.output == "image"
    request = RenderRequest(prompt="a red circle", negative_prompt="blur", guidance=4.5, seed=3, **QUICK)
    first = draws.render(request)
    assert first.shape == (32, 32, 3) and first.dtype == np.uint8 and first.std() > 1
    again = load_renderer(str(tiny_pipeline("stable_diffusion")), "cpu")
    assert np.array_equal(first, again.render(request)) and np.array_equal(first, draws.render(request))
    others: list[dict[str, Any]] = [{"seed": 4}, {"prompt": "blue"}, {"negative_prompt": ""}, {"guidance": 1.0}]
    for other in [*others, {"steps": 3}]:
        assert not np.array_equal(first, draws.render(request.model_copy(update=other))), other


def test_the_seed_leaves_torch_alone(draws: Renderer) -> None:
    import torch

    torch.manual_seed(5)
    before = torch.get_rng_state()
    draws.render(RenderRequest(prompt="x", **QUICK))
    assert torch.equal(before, torch.get_rng_state())


def test_width_and_height_are_not_mixed_up(draws: Renderer) -> None:
    assert draws.render(RenderRequest(prompt="x", width=48, height=24, steps=1)).shape == (24, 48, 3)
    assert draws.render(RenderRequest(prompt="x", steps=1)).shape == (64, 64, 3)  # the pipeline's own


def test_from_an_image(draws: Renderer) -> None:
    image = np.zeros((50, 71, 3), np.uint8)
    image[:25] = 220
    request = RenderRequest(prompt="x", image=image, steps=4, strength=0.5, seed=1)
    first = draws.render(request)
    assert first.shape == (48, 64, 3)  # multiples of 8
    assert np.array_equal(first, draws.render(request))
    assert not np.array_equal(first, draws.render(request.model_copy(update={"seed": 2})))
    assert not np.array_equal(first, draws.render(request.model_copy(update={"image": 255 - image})))
    assert draws.render(request.model_copy(update={"width": 24, "height": 32})).shape == (32, 24, 3)
    wide = np.zeros((16, 4096, 3), np.uint8)
    assert draws.render(RenderRequest(prompt="x", image=wide, steps=1, strength=1.0)).shape == (8, 1024, 3)
    with pytest.raises(ConfigError, match=r"of 2 steps, a strength of 0\.4 leaves none"):
        draws.render(RenderRequest(prompt="x", image=image, steps=2, strength=0.4))
    assert draws.render(RenderRequest(prompt="x", **QUICK)).shape == (32, 32, 3)  # and still from a prompt alone


def test_a_video(tiny_pipeline: Callable[[str], Path]) -> None:
    moves = load_renderer(tiny_pipeline("animate_diff"), "cpu")
    assert moves.output == "video" and moves.rate == 8
    request = RenderRequest(prompt="a red circle moves", frames=4, seed=1, **QUICK)
    frames = moves.render(request)
    assert frames.shape == (4, 32, 32, 3) and frames.dtype == np.uint8
    assert not np.array_equal(frames[0], frames[1])
    again = load_renderer(tiny_pipeline("animate_diff"), "cpu").render(request)
    assert np.array_equal(frames, again)
    assert not np.array_equal(frames, moves.render(request.model_copy(update={"seed": 2})))
    with pytest.raises(ConfigError, match="AnimateDiffPipeline cannot start from an image"):
        moves.render(RenderRequest(prompt="x", image=np.zeros((32, 32, 3), np.uint8)))


def test_a_video_whose_prompt_a_t5_reads(tiny_pipeline: Callable[[str], Path]) -> None:
    moves = load_renderer(tiny_pipeline("wan"), "cpu")
    assert moves.output == "video" and moves.rate == 16
    request = RenderRequest(prompt="a red circle moves", frames=5, seed=1, width=16, height=16, steps=1)
    frames = moves.render(request)
    assert frames.shape == (5, 16, 16, 3) and np.array_equal(frames, moves.render(request))
    with pytest.warns(UserWarning, match="made 5 frames, not 6"):
        moves.render(request.model_copy(update={"frames": 6}))
    with pytest.warns(UserWarning, match=r"takes \d+ tokens .* room for 512"):
        moves.render(request.model_copy(update={"prompt": "a red circle " * 50}))
    with pytest.raises(ConfigError, match=r"WanPipeline cannot draw this .*divisible by 16"):
        moves.render(request.model_copy(update={"height": 24}))


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("short", "short"),
        ("a red circle, a blue square, " * 5, ("a red circle, a blue square, " * 3)[:-2]),
        # the only comma would cost more than half
        ("one, " + "word " * 30, "one, " + " ".join(["word"] * 17)),
        ("x" * 200, "x" * 75),
        ("红色的圆" * 40, "红色的圆" * 6 + "红"),  # three bytes a character
    ],
    ids=["fits", "clause", "word", "endless", "no spaces"],
)
def test_shorten(text: str, kept: str) -> None:
    tokenizer = clip_tokenizer()

    def fits(part: str) -> bool:
        return len(tokenizer(part).input_ids) <= 77

    found = shorten(text, fits)
    assert found == kept and text.startswith(found)


def test_a_long_prompt_is_shortened_and_said(draws: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    given = asked_for(draws, monkeypatch)
    long = "a red circle left of a blue square, on white paper, in soft evening light, with a long shadow behind it"
    with pytest.warns(
        UserWarning, match=r"prompt takes 8\d tokens .* room for 77; left out: 'with a long shadow"
    ) as said:
        draws.render(RenderRequest(prompt=long, **QUICK))
    assert len(said) == 1
    assert given["prompt"] == "a red circle left of a blue square, on white paper, in soft evening light"
    with pytest.warns(UserWarning, match="the negative prompt takes"):
        draws.render(RenderRequest(prompt="x", negative_prompt=long, **QUICK))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draws.render(RenderRequest(prompt="a red circle", negative_prompt="blur", **QUICK))


def test_what_a_pipeline_does_not_take_is_said(draws: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    given = asked_for(draws, monkeypatch)
    with pytest.warns(UserWarning, match="StableDiffusionPipeline takes no num_frames; left out"):
        draws.render(RenderRequest(prompt="x", frames=3, **QUICK))
    assert "num_frames" not in given


def test_each_text_encoder_gets_what_it_reads(draws: Any) -> None:
    class Long:
        model_max_length = 10**30

        def __call__(self, text: str, **_: Any) -> Any:
            return clip_tokenizer()(text, **_)

    draws.pipe.tokenizer_2 = Long()
    try:
        text = "a red circle, " * 10
        takes = {"prompt": None, "prompt_2": None, "max_sequence_length": 100}
        with pytest.warns(UserWarning) as said:
            found = draws._texts("prompt", text, takes)
        assert [len(found["prompt"]), len(found["prompt_2"])] == [82, 110] and len(said) == 2
        assert draws._texts("prompt", "x", {"prompt": None}) == {"prompt": "x"}
    finally:
        del draws.pipe.tokenizer_2


BAD = {
    "empty": ({"prompt": "  "}, "prompt is empty"),
    "no prompt": ({}, "prompt"),
    "size 0": ({"width": 0, "height": 0}, "width"),
    "not a multiple": ({"width": 100, "height": 96}, "multiple of 8"),
    "negative": ({"width": -8, "height": 8}, "width"),
    "huge": ({"width": 1 << 20, "height": 8}, "width"),
    "one side": ({"width": 64}, "width and height, or neither"),
    "steps 0": ({"steps": 0}, "steps"),
    "half a step": ({"steps": 2.5}, "steps"),
    "many steps": ({"steps": 10**9}, "steps"),
    "nan": ({"guidance": float("nan")}, "guidance"),
    "infinite": ({"guidance": float("inf")}, "guidance"),
    "seed": ({"seed": -1}, "seed"),
    "large seed": ({"seed": 2**64}, "seed"),
    "long": ({"prompt": "word " * 20_000}, f"{LONGEST_PROMPT}"),
    "no frames": ({"frames": 0}, "frames"),
    "no fps": ({"fps": 0}, "fps"),
    "too much": ({"width": 4096, "height": 4096, "frames": 1000}, "pixels in all frames"),
    "floats": ({"image": np.zeros((8, 8, 3))}, "uint8"),
    "grey": ({"image": np.zeros((8, 8), np.uint8)}, r"\[H, W, 3\]"),
    "no image": ({"image": "in.png"}, "image"),
    "nothing of it": ({"strength": 0}, "strength"),
    "unknown": ({"negativ_prompt": "x"}, "negative_prompt"),
}


@pytest.mark.parametrize(("fields", "words"), BAD.values(), ids=BAD.keys())
def test_requests_that_nothing_can_draw(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        RenderRequest(**({"prompt": "x"} if fields else {}) | fields)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_what_the_pipeline_itself_refuses_is_one_line(draws: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws.pipe, "check_inputs", lambda *args, **kwargs: int("not a number"))
    with pytest.raises(ConfigError, match=r"StableDiffusionPipeline cannot draw this .*not a number"):
        draws.render(RenderRequest(prompt="x", **QUICK))


def test_places_where_no_renderer_is(tmp_path: Path, tiny_pipeline: Callable[[str], Path]) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        load_renderer(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        load_renderer(tmp_path)
    with pytest.raises(CheckpointError, match="a file"):
        load_renderer(tiny_pipeline("stable_diffusion") / "model_index.json")
    with pytest.raises(CheckpointError, match="to be had from the hub"):
        load_renderer("nobody/has-this")  # offline
    with pytest.raises(ConfigError, match="device"):
        load_renderer(tiny_pipeline("stable_diffusion"), "abacus")


def test_a_hub_id_in_the_cache(
    tiny_pipeline: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit, place = "0" * 40, tmp_path / "models--owner--tiny"
    folder = changed(tiny_pipeline("stable_diffusion"), place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    request = RenderRequest(prompt="x", **QUICK)
    image = load_renderer("owner/tiny", "cpu").render(request)
    assert np.array_equal(image, load_renderer(folder, "cpu").render(request))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": ["os", "System"]}))
    with pytest.raises(CheckpointError, match=r"'vae' is .*no part of diffusers"):
        load_renderer("owner/tiny", "cpu")


INDEXES = {
    "a module of the system": {"vae": ["os", "System"]},
    "a script beside it": {"vae": ["evil", "Evil"]},
    "a script as the pipeline": {"_class_name": ["evil", "Evil"]},
    "no pipeline": {"_class_name": "UNet2DConditionModel"},
    "unknown": {"_class_name": "WarpDrivePipeline"},
    "dotted": {"vae": ["diffusers.loaders", "Evil"]},
    "a function": {"vae": ["transformers", "pipeline"]},
    "a path": {"../vae": ["diffusers", "AutoencoderKL"]},
    "three": {"vae": ["diffusers", "AutoencoderKL", "x"]},
}


@pytest.mark.parametrize("index", INDEXES.values(), ids=INDEXES.keys())
def test_an_index_imports_nothing_else(
    index: dict[str, Any], tiny_pipeline: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = changed(tiny_pipeline("stable_diffusion"), tmp_path / "copy", **index)
    for place in (folder, folder / "vae"):
        (place / "evil.py").write_text("raise SystemExit('ran')\nclass Evil: pass\n")
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        load_renderer(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickles_are_not_opened(part: str, tiny_pipeline: Callable[[str], Path], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    folder = changed(tiny_pipeline("stable_diffusion"), tmp_path / "copy")
    (file,) = (folder / part).glob("*.safetensors")
    torch.save(load_file(file), file.with_name("pytorch_model.bin" if part == "text_encoder" else f"{file.stem}.bin"))
    file.unlink()
    with pytest.raises(CheckpointError, match=r"\.bin: weights in a pickle"):
        load_renderer(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("fault", ["missing", "shape", "cut", "gone", "nan"])
def test_damaged_weights(part: str, fault: str, tiny_pipeline: Callable[[str], Path], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = changed(tiny_pipeline("stable_diffusion"), tmp_path / "copy")
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("weight"))
    if fault == "missing":
        del tensors[name]
    elif fault == "shape":
        tensors[name] = torch.zeros(3)
    elif fault == "nan":
        tensors = {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}
    save_file(tensors, file)
    if fault == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif fault == "gone":
        shutil.rmtree(folder / part)
    with pytest.raises(CheckpointError, match="copy") as caught:
        load_renderer(folder, "cpu").render(RenderRequest(prompt="x", **QUICK))
    assert "\n" not in str(caught.value)


def test_without_diffusers(monkeypatch: pytest.MonkeyPatch, tiny_pipeline: Callable[[str], Path]) -> None:
    import sys

    folder = tiny_pipeline("stable_diffusion")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"pip install 'polymodal\[diffusion\]'"):
        load_renderer(folder)


def test_an_open_renderer_is_handed_through(draws: Renderer) -> None:
    assert load_renderer(draws) is draws
