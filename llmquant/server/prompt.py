"""From a request to the tokens that the model continues."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from llmquant.model.tokenizer import chat_text
from llmquant.server.protocol import Chat, Completion, Refusal


@dataclass(frozen=True)
class Prompts:
    """Tokens of prompts for a model that sees at most `room` of them, and has `vocabulary` of them."""

    tokenizer: PreTrainedTokenizerBase
    room: int
    vocabulary: int

    def ids(self, asked: Chat | Completion) -> list[int]:
        """Raises Refusal: there are none, too many or unknown ones, or chats are not served."""
        if isinstance(asked, Completion):
            field = "prompt"
            ids = list(self.tokenizer(asked.prompt).input_ids) if isinstance(asked.prompt, str) else list(asked.prompt)
        else:
            field = "messages"
            ids = self._chat(asked)
        if not ids:
            raise Refusal(400, f"{field}: no tokens to continue", param=field)
        if max(ids) >= self.vocabulary:
            raise Refusal(400, f"{field}: token {max(ids)}, but there are {self.vocabulary}", param=field)
        if len(ids) >= self.room:
            told = f"{field}: {len(ids)} tokens, but prompt and answer have room for {self.room} together"
            raise Refusal(400, told, param=field, code="context_length_exceeded")
        return ids

    def most(self, asked: Chat | Completion, prompt: int) -> int:
        """New tokens. Refusal: more are asked for than there is room for."""
        room = self.room - prompt
        if asked.most is not None and asked.most > room:
            told = f"max_tokens: {asked.most}, but after {prompt} tokens of the prompt there is room for {room}"
            raise Refusal(400, told, param="max_tokens", code="context_length_exceeded")
        return asked.most or min(room, asked.USUAL or room)

    def _chat(self, asked: Chat) -> list[int]:
        if not self.tokenizer.chat_template:
            raise Refusal(400, "messages: the model has no chat template; use /v1/completions", param="messages")
        messages = [{"role": message.role, "content": message.text} for message in asked.messages]
        try:
            text = chat_text(self.tokenizer, messages)
        except Exception as error:  # a template raises what it likes: a system message here, two users in a row there
            reason = str(error).partition("\n")[0]
            raise Refusal(
                400, f"messages: the model's chat template refuses them ({reason})", param="messages"
            ) from error
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)
