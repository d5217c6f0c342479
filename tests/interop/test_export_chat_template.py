"""Chat templates as stock processors take them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from polymodal.config import TemplateConfig
from polymodal.errors import PolymodalError
from polymodal.interop.huggingface.export_chat_template import (
    LATER,
    differences,
    stock_chat,
    stock_template,
    with_placeholder,
)
from polymodal.messages import Message, user
from polymodal.processing.chat_template.encode import ChatTemplate
from tests.processing.test_chat_template_tokenizers import converted, sentence_piece


@pytest.mark.parametrize("how", ["first", "never", "always"])
def test_such_a_prompt_can_be_exported(how: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A stock processor, which tokenises one string, gives the same ids under the template that is written for it."""
    tokenizer = converted(sentence_piece(str(tmp_path_factory.getbasetemp())), how)
    config = TemplateConfig(chat_template="vicuna", image_newline_text="\n", text_restarts=True)
    ours = ChatTemplate(tokenizer, config, len(tokenizer))
    placed, image, _ = with_placeholder(tokenizer, len(tokenizer))
    source, kept, _ = stock_template(ours, config, placed, image)
    assert differences(ours, kept, source, image) in ([], [LATER])


def test_reasoning_and_tools_are_not_compared() -> None:
    for chat in ([replace(user("a"), tools=({"name": "f"},))], [user("a"), Message("tool", ())]):
        with pytest.raises(PolymodalError, match="with reasoning or tools are not compared"):
            stock_chat(chat)
