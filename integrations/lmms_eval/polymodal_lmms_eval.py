"""`lmms_eval --model polymodal`: any model that `polymodal.load` opens, on the benchmarks of lmms-eval."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from lmms_eval.api.model import lmms
from tqdm import tqdm

import polymodal
from polymodal.backends.base import Answer
from polymodal.errors import ConfigError, PolymodalError
from polymodal.generation.params import GenerationParams

AUTO_BATCH = 16


def manifest() -> Any:
    """What lmms-eval's entry point `lmms_eval.models` asks for."""
    from lmms_eval.models.registry_v2 import ModelManifest  # which is being imported when this module is

    return ModelManifest("polymodal", chat_class_path=f"{__name__}.Polymodal")


class Polymodal(lmms):
    """A model of polymodal; `--model_args` are the arguments of `polymodal.load`, its name as `pretrained`."""

    is_simple = False  # asked with whole conversations

    def __init__(
        self,
        pretrained: str = "default",
        device: str | None = None,
        batch_size: int | str = AUTO_BATCH,
        max_batch_size: int | None = None,
        system_prompt: str | None = None,  # A text, or a file that holds one
        skip_errors: bool = False,  # Answer "" where a question cannot be asked, instead of ending the run
        seed: int = 0,  # Of tasks that sample
        **options: Any,
    ) -> None:
        super().__init__()
        self.model = polymodal.load(str(pretrained), device, **options)
        self.size = AUTO_BATCH if str(batch_size).startswith("auto") else int(batch_size)
        self.size = min(self.size, int(max_batch_size or self.size))
        self.system_prompt = self._resolve_system_prompt(system_prompt) if system_prompt else ""
        self.skip_errors, self.seed = skip_errors, seed

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answer in batches, those of equal settings together."""
        groups: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[decoding(request.args[2], self.seed).model_dump_json()].append(index)
        answers = [""] * len(requests)
        bar = tqdm(total=len(requests), desc="polymodal")
        for settings, indices in groups.items():
            params = GenerationParams.model_validate_json(settings)
            for start in range(0, len(indices), self.size):
                chunk = indices[start : start + self.size]
                asked = [self._conversation(*requests[index].args) for index in chunk]
                for index, answer in zip(chunk, self.model.generate_batch(asked, params), strict=True):
                    args = requests[index].args
                    answers[index] = self._text(answer, args)
                    self.cache_hook.add_partial("generate_until", (args[0], args[2]), answers[index])
                bar.update(len(chunk))
        bar.close()
        return answers

    def _conversation(self, _: str, to_messages: Any, __: Any, doc_id: int, task: str, split: str) -> list[Any]:
        messages = to_messages(self.task_dict[task][split][doc_id])
        return self._apply_system_prompt(messages, self.system_prompt)  # type: ignore[no-any-return]

    def _text(self, answer: Answer, args: tuple[Any, ...]) -> str:
        if isinstance(answer, str):
            return answer
        what = f"{args[4]}, {args[5]}, document {args[3]}: {answer}"
        if not self.skip_errors:
            raise PolymodalError(f"{what} (skip_errors=True in --model_args goes on with an empty answer)")
        tqdm.write(f"answered with nothing: {what}")
        return ""

    def loglikelihood(self, requests: list[Any]) -> Any:
        """Not offered: a backend answers, and weighs no texts of others."""
        raise NotImplementedError("polymodal answers tasks of output_type generate_until only")

    generate_until_multi_round = loglikelihood


def decoding(given: dict[str, Any], seed: int = 0) -> GenerationParams:
    """What a task's generation_kwargs mean here; as in lmms-eval's own models, temperature says whether to sample."""
    if int(given.get("num_beams") or 1) > 1:
        raise ConfigError(f"num_beams {given['num_beams']}: polymodal has no beam search; use --gen_kwargs num_beams=1")
    until = given.get("until") or ()
    temperature = float(given.get("temperature") or 0.0)
    return GenerationParams(
        max_new_tokens=int(given.get("max_new_tokens") or 1024),
        temperature=temperature,
        top_p=float(given.get("top_p") or 1.0) if temperature else 1.0,
        top_k=int(given.get("top_k") or 0) if temperature else 0,
        seed=seed if temperature else None,
        stop=(until,) if isinstance(until, str) else tuple(text for text in until if text),
    )
