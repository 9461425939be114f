"""Conversations as text: by the chat template of the model's tokenizer, or their contents alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from stages.data.pieces import Ends
from stages.errors import UsageError

# "auto": by the chat template; "none": the contents of the messages, separated by empty lines.
ChatTemplate = Literal["auto", "none"]
Messages = Sequence[Mapping[str, str]]  # each with "role" and "content"
Render = Callable[[Messages], str]

# Names of columns that hold conversations, in the order in which they are looked for.
CHAT_COLUMNS = ("messages", "conversations")
# ShareGPT's names of roles.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}


def messages_of(value: Any) -> list[dict[str, str]] | None:
    """A conversation with "role" and "content", from that form or ShareGPT's ("from", "value"); None: it is none."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        return None
    messages = []
    for entry in value:
        if not isinstance(entry, Mapping):
            return None
        role, content = (entry.get("role", entry.get("from")), _text(entry.get("content", entry.get("value"))))
        if not isinstance(role, str) or content is None:
            return None
        messages.append({"role": _ROLES.get(role, role), "content": content})
    return messages


def _text(content: Any) -> str | None:
    """The content of a message: text, or parts of text."""
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        return "".join(parts) if all(isinstance(part, str) for part in parts) else None  # type: ignore[arg-type]
    return content if isinstance(content, str) else None


def contents_alone(messages: Messages) -> str:
    """The contents of the messages, separated by empty lines."""
    return "\n\n".join(message["content"] for message in messages)


def renderer(tokenizer: Any, chat_template: ChatTemplate) -> Render:
    """How a conversation becomes text for a model.

    Where the tokenizer adds BOS to a text, BOS that the template writes at the head of a conversation is left out:
    `stages.data.bos` decides where it stands. A tokenizer that adds none may use the same token for something else (of
    ChatML, ``<|im_start|>`` before each message), so the text stays as the template made it.

    Raises (when it is called):
        UsageError: The tokenizer has no chat template, or it refuses the conversation.
    """
    if chat_template == "none":
        return contents_alone
    adds_bos = tokenizer.bos_token_id is not None and tokenizer.bos_token_id in Ends.of(tokenizer).head
    own_bos = tokenizer.bos_token if adds_bos else ""

    def render(messages: Messages) -> str:
        import jinja2

        remedy = "--chat-template none takes the contents of the messages alone"
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(f"these are conversations, and the model's tokenizer has no chat template; {remedy}")
        try:
            text: str = tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UsageError(f"the chat template of the model's tokenizer refuses it ({error}); {remedy}") from error
        return text.removeprefix(own_bos)

    return render
