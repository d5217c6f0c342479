"""A record as a pair of an image and its captions, for training and for scoring alike."""

from polymodal.data.readers.conversations import Record
from polymodal.errors import DataError
from polymodal.messages import Image, Source


def image_and_captions(record: Record) -> tuple[Source, tuple[str, ...]]:
    """The one image, and what is said of it: the list `captions` beside the record, else its one trained answer."""
    where = f"record {record.id}"
    media = [part for message in record.messages for part in message.media]
    if len(media) != 1 or not isinstance(media[0], Image):
        raise DataError(f"{where}: a pair has one image, found {len(media)} media")
    given = record.extra.get("captions")
    if given is None:
        given = [message.text for message in record.messages if message.role == "assistant" and message.train]
        if len(given) != 1:
            problem = f"its caption is its answer, and it has {len(given)} of them; give one, or a list `captions`"
            raise DataError(f"{where}: {problem}")
    if not isinstance(given, list | tuple) or not given or not all(isinstance(text, str) for text in given):
        raise DataError(f"{where}: `captions` must be a list of texts with one at least")
    captions = tuple(dict.fromkeys(text.strip() for text in given))
    if not all(captions):
        raise DataError(f"{where}: the caption is empty; write one, or take the record out")
    return media[0].source, captions
