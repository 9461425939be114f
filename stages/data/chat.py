"""Conversations as text: by the chat template of the model's tokenizer, or their contents alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from stages.data.pieces import Ends
from stages.data.table import described
from stages.errors import UsageError

# "auto": by the chat template; "none": the contents of the messages, separated by empty lines.
ChatTemplate = Literal["auto", "none"]
# Each with "role", "content" (text; None beside tool calls) and any other keys of the data set.
Message = Mapping[str, Any]
Messages = Sequence[Message]
Render = Callable[[Messages], str]

# Names of columns that hold conversations, in the order in which they are looked for.
CHAT_COLUMNS = ("messages", "conversations")
# ShareGPT's names of roles.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}


# What a message without content may hold instead.
_CALLS = ("tool_calls", "function_call")


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages: objects, of which one at least has "role", or ShareGPT's "from"."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return False
    are_objects = all(isinstance(entry, Mapping) for entry in value)
    return are_objects and any("role" in entry or "from" in entry for entry in value)


def messages_of(conversation: Sequence[Mapping[str, Any]]) -> list[Message]:
    """A conversation with "role" and "content", from that form or ShareGPT's ("from", "value").

    Parts of text are joined. Other entries of a message ("tool_calls", "name") stay as they are, but for those that are
    null, as Parquet fills them in.

    Args:
        conversation: A value of which `is_conversation` is true.

    Raises:
        UsageError: A message cannot be understood; with its number, from 1, and why.
    """
    return [_message(entry, number) for number, entry in enumerate(conversation, 1)]


def _message(entry: Mapping[str, Any], number: int) -> Message:
    given = {key: value for key, value in entry.items() if value is not None}
    role = given.pop("from", None) if "role" not in given else given["role"]
    if not isinstance(role, str):
        raise UsageError(f"message {number} has no role (it has {', '.join(map(str, given)) or 'nothing'})")
    content = given.pop("value", None) if "content" not in given else given["content"]
    if content is None and not any(call in given for call in _CALLS):
        raise UsageError(f"message {number} ({role}) has no content and no tool_calls")
    return {**given, "role": _ROLES.get(role, role), "content": _text(content, f"message {number} ({role})")}


def _text(content: Any, message: str) -> str | None:
    """The content of a message: text, parts of text, or None."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise UsageError(f"{message} holds {described(content)}, not text")
    return "".join(_part(part, message) for part in content)


def _part(part: Any, message: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) else part
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, Mapping) else None
        what = f"a part of type {kind!r}" if kind else f"a part that is {described(part)}"
        raise UsageError(f"{message} has {what}, and text alone can be read")
    return text


def contents_alone(messages: Messages) -> str:
    """The contents of the messages, separated by empty lines."""
    return "\n\n".join(message["content"] for message in messages if message["content"] is not None)


def renderer(tokenizer: Any, chat_template: ChatTemplate) -> Render:
    """How a conversation becomes text for a model.

    Where the tokenizer adds BOS to a text, BOS that the template writes at the head of a conversation is left out:
    `stages.data.bos` decides where it stands. A tokenizer that adds none may use the same token for something else (of
    ChatML, ``<|im_start|>`` before each message), so the text stays as the template made it.

    A message of tool calls has content None for a template that knows tool calls, and "" for another.

    Raises (when it is called):
        UsageError: The tokenizer has no chat template, or it refuses the conversation.
    """
    if chat_template == "none":
        return contents_alone
    adds_bos = tokenizer.bos_token_id is not None and tokenizer.bos_token_id in Ends.of(tokenizer).head
    own_bos = tokenizer.bos_token if adds_bos else ""

    template = getattr(tokenizer, "chat_template", None)
    knows_calls = any(call in str(template) for call in _CALLS)

    def render(messages: Messages) -> str:
        import jinja2

        remedy = "--chat-template none takes the contents of the messages alone"
        if not template:
            raise UsageError(f"these are conversations, and the model's tokenizer has no chat template; {remedy}")
        # A template that knows no tool calls may add the content to other text, which fails for null.
        copies = [dict(m) if knows_calls or m["content"] is not None else {**m, "content": ""} for m in messages]
        try:
            text: str = tokenizer.apply_chat_template(copies, tokenize=False)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UsageError(f"the chat template of the model's tokenizer refuses it ({error}); {remedy}") from error
        return text.removeprefix(own_bos)

    return render
