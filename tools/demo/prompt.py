"""The conversation: a long document that every CPython carries, and questions about it."""

from pydoc_data.topics import topics

from kvstore_engine.tokenizer import Tokenizer

DOCUMENT_TOPIC = "compound"
QUESTIONS = (
    "What does the with statement do?",
    "Which clauses can a try statement have, and when does each of them run?",
    "How does a for statement use its iterator?",
)
OTHER_QUESTION = "In one sentence: what is the match statement for?"


def document(tokenizer: Tokenizer, tokens: int) -> str:
    """The first ``tokens`` tokens of the document."""
    return tokenizer.decode(tokenizer.encode(topics[DOCUMENT_TOPIC])[:tokens])


def conversation(text: str, question: str) -> list[dict[str, str]]:
    """Messages of a chat about ``text``; the document stands first, so that chats share it."""
    return [
        {"role": "system", "content": f"Answer questions about this document.\n\n{text}"},
        {"role": "user", "content": question},
    ]


def shared_tokens(tokenizer: Tokenizer, text: str) -> int:
    """Tokens that two conversations about ``text`` have in common."""
    chats = [
        tokenizer.encode(tokenizer.apply_chat_template(conversation(text, question)))
        for question in (QUESTIONS[0], OTHER_QUESTION)
    ]
    return next(i for i, (a, b) in enumerate(zip(*chats, strict=False)) if a != b)
