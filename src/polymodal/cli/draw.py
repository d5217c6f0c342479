"""Draw an image from a prompt, or from a prompt and an image.

What draws (--renderer) is the small drawer that comes with the package, which knows shapes and emoji; the folder of a
model that draws; the folder or hub id of a pipeline of diffusers, which needs the extra `diffusion`; or an
OpenAI-compatible images endpoint. With --rewrite a language model writes the prompt first. Examples:
  polymodal draw "a red circle left of a blue square" -o out.png
  polymodal draw "a lighthouse in fog" -o out.png --renderer stable-diffusion-v1-5/stable-diffusion-v1-5
  polymodal draw "the same at night" --image out.png -o night.png --renderer pipelines/sd --steps 20 --seed 7
  polymodal draw "what our cat dreams of" -o dream.png --renderer openai:gpt-image-1 --rewrite default
"""

import argparse
import io
import time
from pathlib import Path
from typing import Any

from polymodal.backends import load, load_renderer
from polymodal.cli import common
from polymodal.errors import ConfigError

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("prompt", metavar="PROMPT", help="what is to be seen")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="a .png, .jpg or .webp to write")
    parser.add_argument("--image", metavar="FILE", help="an image to start from")
    parser.add_argument("--strength", type=float, metavar="S", help="how much of it is drawn anew, above 0 to 1 (0.8)")
    add_drawing_arguments(parser)


def add_drawing_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `requested` and `opened` read."""
    add = parser.add_argument
    add(
        "--renderer",
        metavar="NAME",
        help="a folder or hub id, openai:MODEL, or an endpoint's address (for images: the package's)",
    )
    add("--negative-prompt", metavar="TEXT", help="what is not to be seen")
    add("--size", metavar="WxH", help="pixels, such as 512x384; multiples of 8 (the renderer's own)")
    add("--steps", type=int, metavar="N", help="denoising steps (the renderer's own)")
    add("--guidance", type=float, metavar="G", help="how closely the prompt is followed (the renderer's own)")
    add("--seed", type=int, metavar="N", help="another number draws another image (0)")
    add("--rewrite", metavar="MODEL", help='a model that writes the prompt from yours: "default", a folder, openai:...')
    add("--device", help='"cpu" or "cuda"; a GPU where there is one (default)')
    add("--json", action="store_true", help="print what was drawn as one JSON object")
    group = parser.add_argument_group("endpoints", "openai:MODEL reads its key from OPENAI_API_KEY")
    group.add_argument("--base-url", metavar="URL", help="the server, such as http://localhost:8000/v1")
    group.add_argument("--allow-http", action="store_true", help="send the key over http to another host")


def requested(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a request that the flags name; they are checked before anything is loaded."""
    from polymodal.modeling.renderers.base import RenderRequest

    names = ("negative_prompt", "steps", "guidance", "seed", "strength", "frames", "fps")
    fields = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    if args.size is not None:
        width, _, height = args.size.lower().replace("×", "x").partition("x")
        if not (width.strip().isdecimal() and height.strip().isdecimal()):
            raise ConfigError(f"--size is {args.size!r:.40}; it must be such as 512x384 (width x height)")
        fields |= {"width": int(width), "height": int(height)}
    if getattr(args, "image", None) is not None:
        import numpy as np

        from polymodal.media.image import open_image

        fields["image"] = np.asarray(open_image(args.image))
    RenderRequest(prompt=args.prompt, **fields)
    return fields


def opened(args: argparse.Namespace, output: str) -> tuple[Any, Any]:
    """The request and the renderer that the flags name; it gives images, or videos."""
    from polymodal.modeling.renderers.base import RenderRequest

    fields = requested(args)
    renderer = load_renderer(args.renderer, args.device, base_url=args.base_url, allow_http=args.allow_http)
    if renderer.output != output:
        other = {"image": "draw", "video": "animate"}.get(renderer.output)
        how = f"; `polymodal {other}` uses it" if other else ""
        raise ConfigError(f"{renderer.name}: makes {renderer.output}, not {output}{how}")
    if args.rewrite is None:
        return RenderRequest(prompt=args.prompt, **fields), renderer
    from polymodal.backends.prompt_writer import write_request

    request = write_request(load(args.rewrite), args.prompt, given=fields)
    common.note(f"drawing: {common.one_line(request.prompt)}")
    return request, renderer


def drawn(request: Any, renderer: Any, seconds: float, **more: Any) -> dict[str, Any]:
    """What `--json` prints of a drawing."""
    shown = request.model_dump(exclude={"image", "strength"}, exclude_none=True)
    return {**shown, **more, "renderer": renderer.name, "seconds": round(seconds, 3)}


def run(args: argparse.Namespace) -> int:
    """Draw and write."""
    common.check_files(args, "output")
    kind = FORMATS.get(Path(args.output).suffix.lower())
    if kind is None:
        raise ConfigError(f"{args.output}: an image's file ends in {', '.join(FORMATS)}")
    if args.strength is not None and args.image is None:
        raise ConfigError("--strength is for --image, and none was given")
    request, renderer = opened(args, "image")
    begin = time.perf_counter()
    pixels = renderer.render(request)
    seconds = time.perf_counter() - begin
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"quality": 92} if kind != "PNG" else {}))
    common.write_file(args.output, buffer.getvalue())
    height, width = pixels.shape[:2]
    if args.json:
        common.print_json(drawn(request, renderer, seconds, output=args.output, width=width, height=height))
    return 0
