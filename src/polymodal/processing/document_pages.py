"""Documents in conversations become their pages: images, and what is read on them."""

from collections.abc import Sequence

from polymodal.messages import Document, Message


def expand_documents(messages: Sequence[Message]) -> list[Message]:
    """Turn each document into its pages."""
    if any(isinstance(part, Document) for message in messages for part in message.parts):
        raise NotImplementedError
    return list(messages)
